"""The machine that coarse storages share: a code for each element, a table of levels, and a scale for each tile of elements.

A number is ``scale * (level - zero) + offset``. A merge changes only codes and keeps scales, zeros and offsets. Rounding is
stochastic: a code goes at random to one of the two levels around the exact result, which is therefore the expected value.
Rounding to nearest would lose an update that is smaller than the step between two levels.

A storage defines its levels (`levels`), which elements share a scale (`tiles`), and the layout of codes in bytes (`packing`).
Everything else is done here, in units of levels and in the order of their values.
"""
