"""The machine that coarse storages share: a code for each element, a table of levels, and a scale for each tile of elements.

A number is ``scale * (level - zero) + offset``. A merge keeps scales, zeros and offsets and changes codes alone. A code goes to
one of the two levels around what its number is to become, by chance, so that the value to expect is the exact one (stochastic
rounding): where an update is smaller than the step between two levels, the nearest level is the one that the code has already.
A storage says which levels there are (`levels`), which elements share a scale (`tiles`) and how codes lie in bytes (`packing`).
All else is done here, in units of levels and in the order of their values.
"""
