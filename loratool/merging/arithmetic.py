"""Arithmetic of a merge and its inverse on one block: decode, update in fp32, round once, encode; on a CPU or on CUDA."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

from loratool.errors import AdapterError, LoratoolError, RestoreError, quoted
from loratool.merging.delivery import DeliveryCount, measured_rows
from loratool.merging.loaded_target import LoadedTarget
from loratool.merging.plan import Target
from loratool.merging.region import RegionalUpdate, blocks_of, segments
from loratool.merging.residual import add_residual, pack_hint, residual, unpack_hint
from loratool.weights.coarse.output_feedback import OutputFeedback
from loratool.weights.rounding import Rounding

if TYPE_CHECKING:
    import torch

CUDA_BLOCK_BYTES: Final = 1 << 25
"""Bytes of an fp32 block on CUDA. Large, because launches are expensive there."""

ALIGNED: Final = 16
"""fp32 numbers in a cache line. New tensors start on one; at other addresses a BLAS may sum a product in another order."""

Keep = Callable[[range, bytes], None]
"""Stores the residual of a block of rows in the undo file."""


def choose_device(device: str) -> str:
    """Return ``cpu`` or ``cuda:N`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` prefers CUDA.

    Raises:
        LoratoolError: the name is not one of these, or this machine has no such device.
    """
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if device == "cpu":
        return device
    if kind != "cuda" or (number and not number.isdecimal()):
        raise LoratoolError(f"{quoted(device)} is not a device; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise LoratoolError(f"there is no device {quoted(device)}: torch sees {count} CUDA devices; use --device cpu")
    return f"cuda:{int(number or 0)}"


class _Room(threading.local):
    """A worker's buffers for a block and its scratch, reused for every matrix to avoid page faults in new memory."""

    def __init__(self) -> None:
        self._numbers: torch.Tensor | None = None

    def take(self, device: torch.device, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two fp32 tensors, (rows, columns), which are valid until the worker's next call."""
        import torch

        numbers, count = self._numbers, rows * columns
        second = -(-count // ALIGNED) * ALIGNED
        if numbers is None or numbers.device != device or len(numbers) < second + count:
            self._numbers = numbers = torch.empty(second + count, device=device)
        return numbers[:count].view(rows, columns), numbers[second : second + count].view(rows, columns)


_room: Final = _Room()


class BlockArithmetic:
    """One parameter and its updates on `device`, and buffers for its blocks. Each worker makes its own.

    With `beside`, a CUDA device computes beside other workers' computations.
    """

    def __init__(self, target: Target | LoadedTarget, device: str, *, beside: bool = True) -> None:
        import torch

        self.weight = target.weight
        self._cuda = device.startswith("cuda")
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._cuda and beside else None  # type: ignore[no-untyped-call]
        block_bytes = CUDA_BLOCK_BYTES if self._cuda else self.weight.block_bytes
        with self._on_stream():
            loaded = target if isinstance(target, LoadedTarget) else LoadedTarget.of(target, device)
            self.stored, self._updates, self._adds = loaded.stored, loaded.updates, loaded.adds
            self._plain, self.scalable = loaded.rounding, loaded.scalable
            regions = [update.region for update in self._updates]
            self._segments = segments(regions, self.weight)
            self._blocks = list(blocks_of(self._segments, regions, self.weight.columns, block_bytes))
            self._kept = [b""] * len(self._updates)
            self._behind = [
                update
                for place, update in enumerate(self._updates)
                if update.measures_block and any(update.overlaps(each) for each in self._updates[:place])
            ]
            self._measured = self._rows_to_measure(target)
            self._begun: tuple[range, Rounding] = (self._segments[0], self._rounding_of(self._segments[0]))

    def _rows_to_measure(self, target: Target | LoadedTarget) -> Mapping[range, range]:
        """Begin to count what is delivered. Return the rows to measure, by block, unless the storage counts its moves."""
        self.delivery, counts_moves = DeliveryCount(), self.weight.takes == "change"
        if counts_moves or isinstance(target, LoadedTarget) or all(each.update.replaces for each in target.updates):
            return {}
        changing = [rows for rows in self._blocks if not self._is_untouched(rows)]
        self.delivery = DeliveryCount(sum(map(len, changing)) * self.weight.columns)
        return measured_rows(self.weight.name, changing)

    def _rounding(self, rows: range) -> Rounding:
        """Return how to round a block. Error compensation between outputs begins anew with each segment."""
        if rows.start not in self._begun[0]:
            segment = self._segments[bisect_right(self._segments, rows.start, key=lambda each: each.start) - 1]
            self._begun = (segment, self._rounding_of(segment))
        return self._begun[1]

    def _rounding_of(self, segment: range) -> Rounding:
        """Return how to round a segment: error-compensated by calibration inputs, else by its updates' output directions."""
        import torch

        if self._plain.feedback is not None or self.weight.takes == "sum" or not self._adds:
            return self._plain
        directions = [
            each.directions(segment, turned=self.weight.turned) for each in self._updates if each.touches(segment)
        ]
        known = [each for each in directions if each is not None]
        if not known or len(known) < len(directions):
            return self._plain
        first = 0 if self.weight.turned else segment.start
        return Rounding(self._plain.seed, outputs=OutputFeedback(torch.cat(known, 1), first))

    def blocks(self) -> Iterator[range]:
        """Return the blocks of rows, sized for the device."""
        return iter(self._blocks)

    def buffer(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._cuda)

    @property
    def measures(self) -> bool:
        """Whether `measure` must see all blocks, in order, before the first `change`."""
        return False

    def measure(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        """Show the bytes of a block, as they are before the change, to the updates that depend on the whole matrix."""
        with self._on_stream():
            block, scratch = _room.take(self._device, len(rows), self.weight.columns)
            self.stored.decode(rows, tuple(part.to(self._device) for part in parts), block)
            for update in self._updates:
                if update.measures_whole:
                    update.measure(block, rows, scratch)

    def apply(self, rows: range, parts: tuple[torch.Tensor, ...]) -> bytes:
        """Add the updates to the matrix whose bytes are `parts`, in place; return the hint that `revert` needs."""
        if self._is_untouched(rows):
            self._kept = [b""] * len(self._updates)
            return b""
        with self._on_stream():
            block, scratch = _room.take(self._device, len(rows), self.weight.columns)
            on_device = tuple(part.to(self._device, non_blocking=True) for part in parts)
            self._update(rows, on_device, block, scratch)
            self._refuse_overflow(block, rows, on_device, scratch)
            measured = self._measured.get(rows)
            before = None if measured is None else self._decoded(measured, rows, on_device)
            moves = self.stored.encode(rows, block, on_device, self._rounding(rows))
            self._bring_back(on_device, parts)
            if measured is not None and before is not None:
                wanted = block[measured.start - rows.start : measured.stop - rows.start]
                self.delivery.add(before, wanted, self._decoded(measured, rows, on_device))
            if moves is None:
                return b""
            self.delivery.add_moves(block, moves)
            return moves.hint

    def _decoded(self, some: range, rows: range, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Decode some of the rows of a block whose bytes lie row by row, into new memory."""
        import torch

        within = slice(some.start - rows.start, some.stop - rows.start)
        out = torch.empty(len(some), self.weight.columns, device=self._device)
        self.stored.decode(some, tuple(part.view(len(rows), -1)[within].view(-1) for part in parts), out)
        return out

    def _update(self, rows: range, parts: tuple[torch.Tensor, ...], block: torch.Tensor, scratch: torch.Tensor) -> None:
        """Fill `block` with the new W, or with only the change if the storage takes the change."""
        takes_change = self.weight.takes == "change"
        if takes_change and self._adds:
            block.zero_()
        else:
            self.stored.decode(rows, parts, block)
        for update in self._behind:
            update.measure(block, rows, scratch)
        self._kept = [update.apply(block, rows, scratch) for update in self._updates]
        if takes_change and not self._adds:
            self.stored.decode(rows, parts, scratch)
            block.sub_(scratch)

    def _refuse_overflow(
        self, block: torch.Tensor, rows: range, originals: tuple[torch.Tensor, ...], scratch: torch.Tensor
    ) -> None:
        """Raise AdapterError if a sum or a change exceeds the stored type although the original was finite."""
        least, most = block.aminmax()
        if bool(most < self.weight.limit) and bool(least > -self.weight.limit):
            return
        self.stored.decode(rows, originals, scratch)
        if scratch.isfinite().all():
            raise overflow(self.weight.name, rows, self.weight.storage, scalable=self.scalable)

    def revert(self, rows: range, parts: tuple[torch.Tensor, ...], hint: bytes | None) -> None:
        """Take the updates out, last one first, using what `apply` kept for these rows.

        Every machine computes the same bits, which are not always the original ones.
        """
        import torch

        if self._is_untouched(rows):
            return
        with self._on_stream():
            block, scratch = _room.take(self._device, len(rows), self.weight.columns)
            on_device = tuple(part.to(self._device, non_blocking=True) for part in parts)
            takes_change = self.weight.takes == "change"
            if takes_change and self._adds:
                block.zero_()
            else:
                self.stored.decode(rows, on_device, block)
            merged = block.clone() if takes_change and not self._adds else None
            for update, kept in zip(reversed(self._updates), reversed(self._kept), strict=True):
                update.revert(block, rows, scratch, kept)
            if takes_change:  # the added change: W' minus the best estimate of W
                block.neg_() if merged is None else torch.sub(merged, block, out=block)
            self.stored.recover(rows, block, on_device, self._rounding(rows), hint)
            self._bring_back(on_device, parts)

    def _is_untouched(self, rows: range) -> bool:
        """Return whether no update changes any of these rows, so that their bytes stay."""
        return not any(update.touches(rows) for update in self._updates)

    def _pairs(self) -> Iterator[tuple[RegionalUpdate, bytes]]:
        """Return each update with what it kept for the latest rows."""
        return zip(self._updates, self._kept, strict=True)

    def _on_stream(self) -> AbstractContextManager[object]:
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _bring_back(self, on_device: tuple[torch.Tensor, ...], parts: tuple[torch.Tensor, ...]) -> None:
        if self._stream is not None:
            for part, changed in zip(parts, on_device, strict=True):
                part.copy_(changed, non_blocking=True)
            self._stream.synchronize()


def overflow(name: str, rows: range, storage: str, *, scalable: bool) -> AdapterError:
    """Return the error for sums in `rows` of a matrix that its storage cannot hold; `scalable` updates take a weight."""
    advice = (
        "give the adapter a smaller weight, as in ADAPTER=0.5"
        if scalable
        else "its training may have failed; train it again, or merge an earlier version of it"
    )
    return AdapterError(
        f"the merge gives numbers in rows {rows.start} to {rows.stop - 1} of {quoted(name)} that {storage} cannot hold; {advice}"
    )


class Merge(BlockArithmetic):
    """W -> W + updates. `keep` receives, for each block, what arithmetic alone cannot restore."""

    def __init__(self, target: Target | LoadedTarget, device: str, keep: Keep | None = None) -> None:
        super().__init__(target, device)
        self._keep = keep

    @property
    def measures(self) -> bool:
        return any(update.measures_whole for update in self._updates)

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        if self._keep is None:
            self.apply(rows, parts)
            return
        originals = tuple(part.clone() for part in parts)
        hint = self.apply(rows, parts)
        predicted = tuple(part.clone() for part in parts)
        self.revert(rows, predicted, hint)
        doubts = self.stored.doubt(parts, predicted)
        each = zip(originals, predicted, doubts, strict=True)
        width, level = self.weight.element_bytes, self.weight.undo_level
        missing = b"".join(residual(o.numpy(), p.numpy(), d.numpy(), width, level) for o, p, d in each)
        kept = b"".join(pack_hint(each) for update, each in self._pairs() if update.keeps)
        self._keep(rows, (pack_hint(hint) if self.weight.keeps_hint else b"") + kept + missing)


class ApproximateUnmerge(BlockArithmetic):
    """W' -> W' - updates, rounded: off by one unit in the last place for about one element in a hundred."""

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        self.revert(rows, parts, None)


class ExactUnmerge(BlockArithmetic):
    """W' -> W, from the residuals that the merge kept: `frames` yields blocks of rows and their residual, in order."""

    def __init__(self, target: Target, device: str, frames: Iterator[tuple[range, bytes]]) -> None:
        super().__init__(target, device)
        self._frames = frames
        self._residual = b""

    def blocks(self) -> Iterator[range]:
        for rows, packed in self._frames:
            self._residual = packed
            yield rows

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        merged = tuple(part.clone() for part in parts)
        rest = memoryview(self._residual)
        try:
            hint = b""
            if self.weight.keeps_hint:
                hint, rest = unpack_hint(rest, 4 * max(self.weight.rows, self.weight.columns))
            for place, update in enumerate(self._updates):
                if update.keeps:
                    count = update.kept_count(rows)
                    self._kept[place], rest = unpack_hint(rest, 4 * count)
                    self._refuse_unfit(count, self._kept[place])
            self.revert(rows, parts, hint)
            for part, doubt in zip(parts, self.stored.doubt(merged, parts), strict=True):
                rest = add_residual(part.numpy(), doubt.numpy(), rest, self.weight.element_bytes)
            if len(rest):
                raise RestoreError("a block of the undo file holds more than it should")
        except RestoreError as error:
            raise RestoreError(
                f"{quoted(self.weight.name)} cannot be restored: {error}; the undo file is damaged, or the merged model "
                "was changed since; unmerge from the base instead"
            ) from None

    @staticmethod
    def _refuse_unfit(count: int, kept: bytes) -> None:
        if len(kept) != 4 * count:
            raise RestoreError("a block of the undo file is damaged")
