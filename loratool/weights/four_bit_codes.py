"""The codes of a 4-bit matrix: from codes to numbers, and moved so that the numbers change by what is wanted.

Reading never changes a scale. Writing keeps each block's scale and moves codes alone, so that the rest of the file stays
as it is. A code is never rounded to the nearest: an update is much smaller than the step between two codes, and
nearest would put every code back where it was. It goes to one of its two neighbours by chance, so that the value to
expect is the exact one (stochastic rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import CheckpointError, RestoreError, quoted
from loratool.weights.four_bit import VALUES, FourBitWeight
from loratool.weights.short_steps import ShortSteps

if TYPE_CHECKING:
    import torch

    from loratool.weights.rounding import Rounding

PLAIN: Final = bytes(4)
"""What `recover` is told where chance alone decided."""

ALL: Final = slice(None)
Part = tuple[slice, slice]
"""Rows and columns of a block."""

LARGEST_CHANGE: Final = 0.11
"""Of the mean step between two codes, on average over a block. Where it is larger, nothing is passed on to rows. It would
still take off most of the noise, which is small there beside the change, but for an undo file of twice the size, and that of
an update this large is near 8% of the bytes as it is. The blocks of the trained adapters that were measured have 0.107 at most.
"""

CELLS: Final = 1024
"""Equal cells from -1 to 1 so small that none holds more than one value of NF4 or two of FP4 next to zero."""


class LoadedFourBit:
    """A 4-bit matrix whose scales, fp32, one for each block, are in memory."""

    def __init__(self, weight: FourBitWeight, scales: torch.Tensor) -> None:
        import torch

        self.weight = weight
        self._scales = scales
        device = scales.device
        values = torch.tensor(VALUES[weight.state.kind], device=device)
        high, low = torch.meshgrid(values, values, indexing="ij")
        # Two fp32 numbers, looked up as one integer of 64 bits.
        self._pairs = torch.stack([high, low], -1).view(torch.int64).view(256)
        self._sorted, order = values.sort(stable=True)
        self._place_of = order.argsort().to(torch.int32)
        high, low = torch.meshgrid(self._place_of, self._place_of, indexing="ij")
        self._pair_places = torch.stack([high, low], -1).view(torch.int64).view(256)
        self._code_of = order.to(torch.uint8)
        self._high_code_of = self._code_of << 4
        # Above the last step there is none to go to: no number is at or above infinity.
        self._next = torch.cat([self._sorted[1:15], self._sorted.new_full((1,), math.inf)])
        self._per_step = 1 / (self._sorted[1:] - self._sorted[:-1])
        cells = torch.linspace(-1, 1, CELLS + 1, device=device)[:-1]
        self._below = (torch.searchsorted(self._sorted, cells, right=True) - 1).clamp_(0, 14).to(torch.int32)
        self._short = None
        if weight.state.kind == "nf4":
            self._short = ShortSteps(scales, weight.shape, weight.state.blocksize, self._sorted)

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """The bits of bitsandbytes' ``dequantize_4bit``: value times scale in fp32, rounded to the state's dtype."""
        import torch

        flat = self._values_of(rows, parts, out)
        self._by_scale(rows, flat, torch.mul)
        dtype = getattr(torch, self.weight.state.dtype)
        if dtype != torch.float32:
            out.copy_(out.to(dtype))

    def encode(self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding) -> bytes:
        """Move the codes in `parts` to those of `block`, each to one of the two values around its own, by chance.

        What is moved by is the difference to the old decoded value, so a code that nothing was added to stays. In NF4 the
        codes with short steps carry it for the others (`ShortSteps`), and how many of each column do, int32, is what `recover`
        is told. What errors add that were passed on (`Feedback`, `OutputFeedback`) it is not told; that is left to the undo file.
        """
        import torch

        old = torch.empty_like(block)
        self.decode(rows, parts, old)
        shift = (block - old).view(-1)
        self._by_scale(rows, shift, _divide)
        places, noise = self._places(parts, len(shift)), rounding.noise(rows, len(shift), shift.device)
        carried, told = self._carried(rows, places, shift)
        if rounding.feedback is None and rounding.outputs is None:
            self._put(parts, self._moved(places, carried, noise))
            return told
        moved, short = self._moved_with_feedback(rows, old, shift, carried, places, noise, rounding)
        self._put(parts, moved.view(-1))
        return told if short else PLAIN

    def _carried(self, rows: range, places: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, bytes]:
        """The shift as the codes that take part carry it, in units of the scale, and what `recover` is told of them."""
        if self._short is None:
            return shift, PLAIN
        chosen = self._short.chosen(rows, places, shift)
        counts = self._short.counts(rows, chosen)
        return self._short.concentrated(rows, shift, chosen, counts), counts.cpu().numpy().tobytes()

    def _moved_with_feedback(
        self,
        rows: range,
        old: torch.Tensor,
        shift: torch.Tensor,
        carried: torch.Tensor,
        places: torch.Tensor,
        noise: torch.Tensor,
        rounding: Rounding,
    ) -> tuple[torch.Tensor, bool]:
        """Where the codes go when errors are passed on, (rows, columns), and whether `carried` was used for it."""
        import torch

        scale = torch.ones_like(old)
        self._by_scale(rows, scale.view(-1), _multiply)
        per_scale = torch.where(scale == 0, 0.0, 1 / scale)  # where all is zero no code moves
        change, wanted = (flat.view(old.shape) * scale for flat in (shift, carried))

        def move(part: Part, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Where the codes of a part of the block go when a change is added, and the numbers that they stand for there."""
            steps = added * per_scale[part]
            here, chance = (flat.view(old.shape)[part].reshape(-1) for flat in (places, noise))
            there = self._moved(here, steps.reshape(-1), chance)
            return there.view(steps.shape), self._sorted.index_select(0, there).view(steps.shape) * scale[part]

        if rounding.feedback is not None:
            return rounding.feedback.best(old, change, wanted, lambda part, added: move((ALL, part), added))
        assert rounding.outputs is not None
        if _mean_change(carried) > LARGEST_CHANGE:
            moved, reached = move((ALL, ALL), wanted)
            rounding.outputs.leave(rows, reached.sub_(old).sub_(change))
            return moved, True
        return rounding.outputs.carry(rows, old, change, wanted, lambda part, added: move((part, ALL), added)), True

    def recover(
        self,
        rows: range,
        parts: tuple[torch.Tensor, ...],
        block: torch.Tensor,
        subtract: Callable[[torch.Tensor], None],
        rounding: Rounding,
        told: bytes | None,
    ) -> None:
        """Take back what `encode` did.

        Chance is known, so a code came from where the same chance leads to it: from itself, or from the one that lies
        against what was added. About one in a hundred could have come from both, or was moved further.
        """
        import torch

        subtract(block.zero_())
        shift = block.neg_().view(-1)
        self._by_scale(rows, shift, _divide)
        noise = rounding.noise(rows, len(shift), shift.device)
        stayed = self._places(parts, len(shift))
        came = (stayed - torch.sign(shift).to(torch.int32)).clamp_(0, 15)
        from_there, from_itself = shift, shift
        if self._short is not None and told != PLAIN:
            chosen = self._short.chosen(rows, stayed, shift)
            counts = self._counts(told, rows, chosen)
            from_itself = self._short.concentrated(rows, shift, chosen, counts)
            from_there = self._short.concentrated(rows, shift, self._short.chosen(rows, came, shift), counts)
        only = (self._moved(came, from_there, noise) == stayed) & (self._moved(stayed, from_itself, noise) != stayed)
        self._put(parts, torch.where(only, came, stayed))

    def _counts(self, told: bytes | None, rows: range, chosen: torch.Tensor) -> torch.Tensor:
        """What `encode` told; without it, what can be seen of it now."""
        import torch

        assert self._short is not None
        if told is None:
            return self._short.counts(rows, chosen)
        if len(told) != 4 * self.weight.shape[1]:
            raise RestoreError("a block of the undo file is damaged")
        return torch.frombuffer(bytearray(told), dtype=torch.int32).to(chosen.device)

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        import torch

        return tuple(torch.zeros_like(part) for part in stored)

    def _places(self, parts: tuple[torch.Tensor, ...], count: int) -> torch.Tensor:
        """The place of each code's value in the order of size: int32, 0 to 15."""
        import torch

        (raw,) = parts
        return self._pair_places.index_select(0, raw.int()).view(torch.int32)[:count]

    def _put(self, parts: tuple[torch.Tensor, ...], places: torch.Tensor) -> None:
        """Put the codes of `places` into `parts`."""
        import torch

        if len(places) % 2:
            places = torch.cat([places, self._place_of[:1]])
        torch.add(
            self._high_code_of.index_select(0, places[::2]),
            self._code_of.index_select(0, places[1::2]),
            out=parts[0],
        )

    def _moved(self, places: torch.Tensor, shift: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Where the values at `places` go when `shift`, in units of the scale, is added.

        To the value above with the odds of its nearness, else to the one below; `noise` decides.
        """
        some = _true(shift != 0)  # of an update that few codes carry, the others need no work
        here, added = places.index_select(0, some), shift.index_select(0, some)
        wanted = self._sorted.index_select(0, here).add_(added)
        below = self._at_or_below(wanted)
        odds = wanted.sub_(self._sorted.index_select(0, below)).mul_(self._per_step.index_select(0, below))
        return places.index_copy(0, some, below.add_(odds > noise.index_select(0, some)))

    def _at_or_below(self, wanted: torch.Tensor) -> torch.Tensor:
        """The place of the largest value that is not above each number, 14 at most."""
        cell = (wanted + 1).mul_(CELLS // 2).clamp_(0, CELLS - 1).int()
        below = self._below.index_select(0, cell)
        for _ in range(2 if self.weight.state.kind == "fp4" else 1):
            below += wanted >= self._next.index_select(0, below)
        return below

    def _values_of(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        """Put the value of each code into `out`; returns it flat."""
        import torch

        (raw,) = parts
        flat = out.view(-1)
        if rows.start * out.shape[1] % 2:
            raise CheckpointError(f"{quoted(self.weight.name)} was cut inside a byte; the undo file is damaged")
        pairs = self._pairs.index_select(0, raw.int())
        flat.copy_(pairs.view(torch.float32)[: len(flat)])
        return flat

    def _by_scale(self, rows: range, flat: torch.Tensor, operation: Callable[..., Any]) -> None:
        """Multiply or divide the elements, in place, by the scales of their blocks."""
        size, start = self.weight.state.blocksize, rows.start * self.weight.shape[1]
        first, offset = divmod(start, size)
        scales = self._scales[first : -(-(start + len(flat)) // size)]
        if offset == 0 and len(flat) % size == 0:
            blocks = flat.view(-1, size)
            operation(blocks, scales[:, None], out=blocks)
        else:
            operation(flat, scales.repeat_interleave(size)[offset : offset + len(flat)], out=flat)


def _mean_change(change: torch.Tensor) -> float:
    """The mean size of a change in units of the scale, in mean steps between two codes: 15 steps lead from -1 to 1."""
    import torch

    return float(change.abs().sum(dtype=torch.float64)) / len(change) * 15 / 2


def _true(mask: torch.Tensor) -> torch.Tensor:
    """Where a flat `mask` is true: int64. On a CPU numpy tells it several times as quickly as torch."""
    import numpy as np
    import torch

    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def _multiply(numbers: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
    import torch

    torch.mul(numbers, scales, out=out)


def _divide(numbers: torch.Tensor, scales: torch.Tensor, *, out: torch.Tensor) -> None:
    """`numbers` by `scales`; by 1 where a block is all zeros, whose scale is zero."""
    import torch

    torch.div(numbers, torch.where(scales == 0, 1.0, scales), out=out)
