"""The codes of a 4-bit matrix: from codes to numbers, and moved so that the numbers change by what is wanted.

Reading never changes a scale. Writing keeps each block's scale and moves codes alone, so that the rest of the file stays
as it is. A code is never rounded to the nearest: an update is much smaller than the step between two codes, and
nearest would put every code back where it was. It goes to one of its two neighbours by chance, so that the value to
expect is the exact one (stochastic rounding).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratool.errors import CheckpointError, RestoreError, quoted
from loratool.weights.code_table import CodeTable, true_places, where_at_least
from loratool.weights.four_bit import FourBitWeight
from loratool.weights.moves import Movable, Moves
from loratool.weights.output_feedback import MOST_PASSED
from loratool.weights.rounding import WORDS, noise_of
from loratool.weights.short_steps import ShortSteps

if TYPE_CHECKING:
    import torch

    from loratool.weights.feedback import Feedback
    from loratool.weights.output_feedback import OutputFeedback
    from loratool.weights.rounding import Rounding

PLAIN: Final = bytes(4)
"""The hint for `recover` where chance alone decided."""

LARGEST_CHANGE: Final = 0.11
"""Of the mean step between two codes, on average over a block. Where it is larger, nothing is passed on to rows. It would
still take off most of the noise, which is small there beside the change, but for an undo file of twice the size, and that of
an update this large is near 8% of the bytes as it is. The blocks of the trained adapters that were measured have 0.103 at most.
"""

LOOKED_AT: Final = 64
"""In so many rows of a block at least it is looked how large its change is."""

STRIP: Final = 1 << 18
"""About so many elements are worked on at once: what is made of them stays in a processor's own cache."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a matrix that are to change.

    Attributes:
        rows: which ones.
        raw: uint8, the bytes of their codes.
        change: fp32, (rows, columns), what is to be added to the numbers that these stand for.
        words: int16, flat, chance for each.
    """

    rows: range
    raw: torch.Tensor
    change: torch.Tensor
    words: torch.Tensor


@dataclass(frozen=True, slots=True)
class Carriers:
    """Which codes of a block carry its change.

    Attributes:
        chosen: int8, flat: 1 for those that take part.
        gain: fp32, (columns,), how many times its own change each of them carries.
        hint: what `recover` needs to know of them.
    """

    chosen: torch.Tensor
    gain: torch.Tensor
    hint: bytes


class LoadedFourBit:
    """A 4-bit matrix whose scales, fp32, one for each block, are in memory."""

    def __init__(self, weight: FourBitWeight, scales: torch.Tensor) -> None:
        import torch

        self.weight = weight
        self._scales = scales
        # No code of a block moves that is all zeros (double quantization makes little of it, of either sign), or so small
        # that there is no fp32 number to multiply by.
        self._per_scale = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, 1 / scales)
        self._table = CodeTable(weight.state.kind, scales.device)
        self._short = None
        if weight.state.kind == "nf4":
            self._short = ShortSteps(scales, weight.shape, weight.state.blocksize, self._table.sorted)

    def decode(self, rows: range, parts: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        """The bits of bitsandbytes' ``dequantize_4bit``: value times scale in fp32, rounded to the state's dtype."""
        import torch

        (raw,) = parts
        if rows.start * out.shape[1] % 2:
            raise CheckpointError(f"{quoted(self.weight.name)} was cut inside a byte; the undo file is damaged")
        dtype = getattr(torch, self.weight.state.dtype)
        for few in self._strips(rows):
            numbers = self._times(self._scales, few.rows, self._table.values(raw[few.bytes], few.count))
            out[few.part] = numbers.view(-1, out.shape[1]).to(dtype)

    def encode(self, rows: range, block: torch.Tensor, parts: tuple[torch.Tensor, ...], rounding: Rounding) -> Moves:
        """Move the codes in `parts`, each to one of the two values around what it is to become, by chance.

        `block` is what the numbers are to change by; a code that nothing is added to stays. In NF4 the codes with short steps
        carry it for the others (`ShortSteps`), and how many of each column do, int32, is the hint for `recover`. What errors add
        that were passed on (`Feedback`, `OutputFeedback`) is left to the undo file.
        """
        (raw,) = parts
        work = Block(rows, raw, block, rounding.words(rows, block.numel(), block.device))
        sizes = self._sizes(rows, block)
        carriers = self._carriers(work, sizes)
        hint = carriers.hint if carriers else PLAIN
        squares = self._squares(rows, raw)
        if rounding.feedback is None:
            at, there, jumps = self._by_chance(work, carriers, rounding.outputs, _mean_steps(sizes))
        else:
            at, there, jumps, short = self._with_least_error(work, carriers, rounding.feedback)
            hint = hint if short else PLAIN
        self._table.put(raw, at, there)
        return Moves(at, jumps, squares, hint)

    def _carriers(self, block: Block, sizes: torch.Tensor) -> Carriers | None:
        """The codes that carry a change, of these `sizes` in some rows, where not all do."""
        import torch

        if self._short is None:
            return None
        level = self._short.level(sizes.amax(1))
        chosen, counts = [], torch.zeros(self.weight.shape[1], device=block.raw.device)
        for few in self._strips(block.rows):
            change = block.change[few.part]
            some = self._short.chosen(few.rows, block.raw[few.bytes], change, level)
            counts += some.view(change.shape).float().sum(0)
            chosen.append(some)
        hint = counts.to(torch.int32).cpu().numpy().tobytes()
        return Carriers(torch.cat(chosen), self._short.gain(block.rows, counts), hint)

    def _sizes(self, rows: range, change: torch.Tensor) -> torch.Tensor:
        """How large a change of a block is, in units of the scale, in rows spread over it: fp32, (rows, columns)."""
        columns, size = change.shape[1], self.weight.state.blocksize
        step = max(1, len(rows) // LOOKED_AT - 1) | 1  # odd, as what rows have in common (heads) comes in powers of two
        if columns % size:
            return self._times(self._per_scale, rows, change.view(-1)).view(change.shape)[::step].abs()
        scales = self._per_scale.view(-1, columns // size, 1)[rows.start : rows.stop : step]
        return (change[::step].view(*scales.shape[:2], size).abs() * scales).view(-1, columns)

    def _carried(self, few: Strip, block: Block, gains: torch.Tensor | float) -> torch.Tensor:
        """What the codes of a strip are to change by, in units of the scale, times the `gains` of columns: (rows, columns)."""
        change = block.change[few.part]
        return self._times(self._per_scale, few.rows, change.view(-1)).view(change.shape).mul_(gains)

    def _by_chance(
        self, block: Block, carriers: Carriers | None, outputs: OutputFeedback | None, mean_steps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which codes move, to which places, and by how much their numbers change.

        Errors are passed on between rows where the change, `mean_steps` on average, is not large.
        """
        import torch

        if outputs is None or mean_steps > LARGEST_CHANGE:
            codes = self._movable(block, carriers, 1)
            there, jumps = self._moved(codes, codes.wanted)
            if outputs is not None:
                outputs.leave(block.rows, _error(block.change, codes.at, jumps))
        else:
            codes = self._movable(block, carriers, 1 + MOST_PASSED)
            columns, last, found = block.change.shape[1], 0, []
            for group, passed in outputs.groups(block.rows, columns):
                part = slice(group.start - block.rows.start, group.stop - block.rows.start)
                first, last = last, int(torch.searchsorted(codes.at, part.stop * columns))
                few = codes[first:last]
                at, most = few.at - part.start * columns, few.wanted.abs().mul_(MOST_PASSED)
                added = (
                    passed.view(-1).index_select(0, at).div_(few.scales).maximum(-most).minimum(most).add_(few.wanted)
                )
                found.append(self._moved(few, added))
                outputs.add(group, _error(block.change[part], at, found[-1][1]))
            there, jumps = (torch.cat(column) for column in zip(*found, strict=True))
        moved = true_places(jumps != 0)  # and not from one of FP4's zeros to the other
        at, there, jumps = (each.index_select(0, moved) for each in (codes.at, there, jumps))
        return at, there, jumps

    def _moved(self, codes: Movable, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places that codes come to when something is added, in units of their scales; and how their numbers change."""
        there = self._table.moved(codes.places, added, codes.noise)
        return there, self._numbers(there, codes.scales).sub_(self._numbers(codes.places, codes.scales))

    def _movable(self, block: Block, carriers: Carriers | None, most: float) -> Movable:
        """The codes that chance may move when up to `most` times what they are to change by is added.

        A code goes up where the odds, change / step, are above its noise, and down where they are above ``1 - noise``. No step
        is shorter than the shortest, so that of most codes it is known without a look at theirs.
        """
        import torch

        times = most * WORDS / self._table.shortest
        gains = times if carriers is None else carriers.gain * times
        found = []
        for few in self._strips(block.rows):
            # In units of 1 / WORDS, noise is words + 1/2 + WORDS / 2; the two conditions are one on the distance to the middle,
            # which no code meets that nothing is added to.
            odds, words = self._carried(few, block, gains).view(-1), block.words[few.flat]
            chosen = None if carriers is None else carriers.chosen[few.flat]
            at = where_at_least(odds.sub(words.float()).sub_(0.5).abs_(), WORDS / 2, chosen)
            wanted, noise = odds.index_select(0, at).div_(times), noise_of(words.index_select(0, at))
            places = self._table.places_at(block.raw[few.bytes], at)
            at += few.flat.start
            found.append((at, places, self._of_blocks(self._scales, block.rows, at), wanted, noise))
        return Movable(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _with_least_error(
        self, block: Block, carriers: Carriers | None, feedback: Feedback
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """As `_by_chance`, with errors passed on between columns; and whether `carriers` were used."""
        import torch

        shape = block.change.shape
        before, one = torch.empty(shape, device=block.raw.device), block.change.new_ones(shape).view(-1)
        self.decode(block.rows, (block.raw,), before)
        scale, per_scale = (self._times(each, block.rows, one).view(shape) for each in (self._scales, self._per_scale))
        here = self._table.places(block.raw, len(one)).view(shape).int()
        carried = block.change
        if carriers is not None:
            carried = block.change * carriers.gain * carriers.chosen.view(shape)

        def ordered(each: torch.Tensor) -> torch.Tensor:
            return each.index_select(1, feedback.order)

        places, noise, scales, per_scale = map(ordered, (here, noise_of(block.words).view(shape), scale, per_scale))

        def move(part: slice, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Where the codes of these columns go when a change is added, and the numbers that they stand for there."""
            steps = added * per_scale[:, part]
            there = self._table.moved_where_shifted(
                *(each.reshape(-1) for each in (places[:, part], steps, noise[:, part]))
            )
            values = self._table.sorted.index_select(0, there).view(steps.shape)
            return there.view(steps.shape), values * scales[:, part]

        in_order, short = feedback.best(ordered(before), ordered(block.change), ordered(carried), move)
        moved = torch.empty_like(here).index_copy_(1, feedback.order, in_order)
        at = true_places((moved != here).view(-1))
        there, at_scales = (each.view(-1).index_select(0, at) for each in (moved, scale))
        return at, there, self._numbers(there, at_scales).sub_(before.view(-1).index_select(0, at)), short

    def recover(
        self,
        rows: range,
        block: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        rounding: Rounding,
        hint: bytes | None,
    ) -> None:
        """Take back what `encode` did.

        Chance is known, so a code came from where the same chance leads to it: from itself, or from the one that lies
        against what was added. About one in a hundred could have come from both, or was moved further.
        """
        import torch

        (raw,) = parts
        shift = self._times(self._per_scale, rows, block.add_(0.0).view(-1))  # no -0, whose sign would count
        noise = noise_of(rounding.words(rows, len(shift), shift.device))
        stayed = self._table.places(raw, len(shift))
        came = stayed.view(torch.int8).sub(torch.sign(shift).to(torch.int8)).clamp_(0, 15).view(torch.uint8)
        from_there, from_itself = shift, shift
        if self._short is not None and hint != PLAIN:
            level = self._short.level(self._sizes(rows, block).amax(1))
            chosen = self._short.chosen(rows, raw, shift, level)
            counts = self._counts(hint, chosen.view(block.shape))
            grown = (shift.view(block.shape) * self._short.gain(rows, counts)).view(-1)
            came_chosen = self._short.chosen(rows, self._table.bytes(came), shift, level)
            from_itself, from_there = (torch.where(some.view(torch.bool), grown, 0.0) for some in (chosen, came_chosen))
        came_by, left_by = (self._table.moved_where_shifted(places.int(), by, noise)
                            for places, by in ((came, from_there), (stayed, from_itself)))  # fmt: skip
        at = true_places((came_by == stayed) & (left_by != stayed))
        self._table.put(raw, at, came.index_select(0, at).int())

    def _counts(self, hint: bytes | None, chosen: torch.Tensor) -> torch.Tensor:
        """How many codes of each column took part: the hint of `encode`; without it, what can be seen of it now."""
        import torch

        if hint is None:
            return chosen.sum(0, dtype=torch.int32)
        if len(hint) != 4 * self.weight.shape[1]:
            raise RestoreError("a block of the undo file is damaged")
        return torch.frombuffer(bytearray(hint), dtype=torch.int32).to(chosen.device)

    def doubt(self, stored: tuple[torch.Tensor, ...], predicted: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        import torch

        return tuple(torch.zeros_like(part) for part in stored)

    def _numbers(self, places: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers, fp32, that codes at `places`, int32, stand for under these scales."""
        import torch

        return (
            self._table.sorted.index_select(0, places).mul_(scales).to(getattr(torch, self.weight.state.dtype)).float()
        )

    def _squares(self, rows: range, raw: torch.Tensor) -> float:
        """The sum of the squares of the numbers of these rows, but for how they are rounded."""
        import torch

        columns, size = self.weight.shape[1], self.weight.state.blocksize
        if columns % size or size % 2:
            numbers = self._times(self._scales, rows, self._table.values(raw, len(rows) * columns))
            return float(numbers.square_().sum(dtype=torch.float64))
        scales = self._scales[rows.start * columns // size : rows.stop * columns // size]
        return float(self._table.squares(raw, size).mul_(scales).mul_(scales).sum(dtype=torch.float64))

    def _strips(self, rows: range) -> Iterator[Strip]:
        """A block of rows in strips, each but the last of an even number of rows, so that none begins inside a byte.

        On a device that is no CPU the block is one strip.
        """
        columns = self.weight.shape[1]
        step = max(2, STRIP // max(columns, 1) // 2 * 2) if self._scales.device.type == "cpu" else len(rows)
        for start in range(rows.start, rows.stop, max(step, 1)):
            yield Strip(rows, range(start, min(start + step, rows.stop)), columns)

    def _of_blocks(self, scales: torch.Tensor, rows: range, at: torch.Tensor) -> torch.Tensor:
        """The numbers in `scales` of the blocks that the elements `at` these places of the flattened rows belong to."""
        import torch

        places = at + rows.start * self.weight.shape[1]
        return scales.index_select(0, torch.div(places, self.weight.state.blocksize, rounding_mode="floor"))

    def _times(self, scales: torch.Tensor, rows: range, flat: torch.Tensor) -> torch.Tensor:
        """The elements of the flattened rows times the number in `scales` of their block, new."""
        size, start = self.weight.state.blocksize, rows.start * self.weight.shape[1]
        first, offset = divmod(start, size)
        here = scales[first : -(-(start + len(flat)) // size)]
        if offset == 0 and len(flat) % size == 0:
            return (flat.view(-1, size) * here[:, None]).view(-1)
        return flat * here.repeat_interleave(size)[offset : offset + len(flat)]


@dataclass(frozen=True, slots=True)
class Strip:
    """Some rows of a block of `whole` rows, and where in it they are: rows, elements and bytes."""

    whole: range
    rows: range
    columns: int

    @property
    def part(self) -> slice:
        return slice(self.rows.start - self.whole.start, self.rows.stop - self.whole.start)

    @property
    def flat(self) -> slice:
        return slice(self.part.start * self.columns, self.part.stop * self.columns)

    @property
    def bytes(self) -> slice:
        return slice(self.flat.start // 2, -(-self.flat.stop // 2))

    @property
    def count(self) -> int:
        return len(self.rows) * self.columns


def _mean_steps(sizes: torch.Tensor) -> float:
    """How large changes in units of the scale are on average, in mean steps between two codes: 15 steps lead from -1 to 1."""
    import torch

    return float(sizes.sum(dtype=torch.float64)) / max(sizes.numel(), 1) * 15 / 2


def _error(change: torch.Tensor, at: torch.Tensor, jumps: torch.Tensor) -> torch.Tensor:
    """What numbers are off by that were to change by `change`, when those numbered `at` changed by `jumps`: new."""
    error = change.neg()
    error.view(-1).index_add_(0, at, jumps)
    return error
