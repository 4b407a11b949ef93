"""Stream matrices into another storage: dense to quantized, or quantized to dense, with or without updates.

The intermediate matrix is dense, in the dtype that it has or decodes to. A merged matrix therefore has the same bytes as after a
merge into the dense model, and a quantized one the same bytes as the dense model quantized. Only a matrix that is merged *and*
quantized is not rounded in between: its fp32 sums are quantized directly (`_Stream._store_merged_quantized`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from loratool.checkpoint.blocks import row_blocks
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.layout import Layout, NewFiles, new_files
from loratool.checkpoint.model import CONFIG_NAME
from loratool.errors import CheckpointError, quoted
from loratool.merging.arithmetic import Merge, choose_device, overflow
from loratool.merging.conversion_plan import Conversion, ConversionPlan
from loratool.merging.converted_writer import ConvertedWriter
from loratool.merging.delivery import DeliveryCount
from loratool.merging.dense_reader import Reader, elements, turned
from loratool.merging.plan import Target
from loratool.merging.stream import Progress, opened
from loratool.merging.workers import Job, cpu_workers, work_through
from loratool.weights.making import Quantizer

if TYPE_CHECKING:
    import torch


SHRUNK: Final = 2.0
"""A scale that shrinks by more than this cuts off numbers from before the merge."""

STRETCH: Final = 1 << 18
"""Elements quantized at a time: few enough to stay in a cache, and a multiple of every block size."""


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion.

    Attributes:
        before, after: BLAKE3 digests of the base's tensors and of the new model's, by name.
        delivery: counts for each matrix that is merged into, by name.
        unchanged: the matrices whose bytes the merge did not change.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    delivery: Mapping[str, DeliveryCount]
    unchanged: tuple[str, ...] = ()


def write_converted(plan: ConversionPlan, folder: Path, *, device: str, known: Mapping[str, str],
                    progress: Progress) -> Converted:  # fmt: skip
    """Write the planned model into the empty `folder`. `known` are already computed digests of the base's tensors, by name.

    Raises:
        CheckpointError, AdapterError: a matrix is damaged, or a sum exceeds its dtype.
        OutputError: the disk is full.
    """
    if plan.config is not None:
        content = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_NAME).write_text(content, encoding="utf-8")
    with new_files(plan.layout, folder, plan.others, progress) as new:
        return _convert(plan, new, device, known, progress)


def compute_converted(plan: ConversionPlan, *, device: str, progress: Progress) -> Converted:
    """Compute the digests that the planned model would have, and write nothing.

    Raises:
        CheckpointError, AdapterError: as `write_converted`.
    """
    return _convert(plan, None, device, {}, progress)


def _convert(plan: ConversionPlan, new: NewFiles | None, device: str, known: Mapping[str, str],
             progress: Progress) -> Converted:  # fmt: skip
    """Convert every matrix while the other tensors are copied and hashed; without `new`, only hash."""
    conversions = sorted(plan.conversions, key=lambda conversion: -conversion.nbytes)
    before, after = dict(known), dict[str, str]()
    delivery: dict[str, DeliveryCount] = {}
    unchanged: list[str] = []
    digested = {name for conversion in conversions for name in conversion.digested}
    unknown = [info for name, info in plan.base.tensors.items() if name not in known and name not in digested]

    def digest(info: TensorInfo) -> None:
        copied = new is not None and info.name in plan.layout.kept
        before[info.name] = hash_tensor(info, (lambda count: None) if copied else progress)

    def one(conversion: Conversion, stop: threading.Event) -> None:
        with suppress(_Stopped), _Stream(conversion, plan.layout, new, device, progress, stop) as stream:
            stream.store()
            after.update(stream.digests())
            if stream.delivery is not None:
                delivery[conversion.name] = stream.delivery
            if stream.unchanged:
                unchanged.append(conversion.name)
            for name in conversion.digested:
                before.setdefault(name, stream.source_digest())

    jobs: list[Job] = [*(new.copies if new else ()), *(partial(digest, info) for info in unknown)]
    tasks = [partial(one, conversion) for conversion in conversions]
    files = set(new.files.values()) if new else set()
    computing = any(conversion.twice for conversion in conversions)
    work_through(tasks, workers=cpu_workers(computing=computing), beside=jobs, files=files)
    kept = {name: before[name] for name in plan.layout.kept}
    return Converted(before, after | kept, delivery, tuple(sorted(unchanged)))


class _Stopped(Exception):  # noqa: N818 (nothing is wrong with this matrix)
    """Another worker failed."""


class _Stream:
    """Streams one matrix from the base's files to the new files or, if there are none, only to digests."""

    def __init__(self, conversion: Conversion, layout: Layout, new: NewFiles | None, device: str, progress: Progress,
                 stop: threading.Event) -> None:  # fmt: skip
        self.delivery: DeliveryCount | None = None
        self._differs = False
        self._conversion, self._device = conversion, device
        self._progress, self._stop = progress, stop
        self._outlet = ConvertedWriter(layout, new)
        self._sources: Mapping[Path, int] = {}
        self._read_digest = blake3()
        self._stack = ExitStack()

    def __enter__(self) -> _Stream:
        self._sources = self._stack.enter_context(opened({info.file for info in self._conversion.source.tensors}))
        self._stack.enter_context(self._outlet)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def unchanged(self) -> bool:
        """Whether the matrix was merged into without changing the bytes written."""
        return self._conversion.merge is not None and not self._differs

    def source_digest(self) -> str:
        """The digest of the bytes read, once all are read."""
        return str(self._read_digest.hexdigest())

    def digests(self) -> dict[str, str]:
        """The digests of the tensors written, by name."""
        return self._outlet.digests()

    def store(self) -> None:
        """Read, convert and write the whole matrix."""
        conversion = self._conversion
        if conversion.new is None:
            self._store_dense()
            return
        quantizer = conversion.new.quantizer()
        if conversion.merge is None:
            self._store_quantized(quantizer)
        elif conversion.into_image:
            self._store_merged_image(quantizer, conversion.merge)
        else:
            self._store_merged_quantized(quantizer)

    def _store_dense(self) -> None:
        conversion = self._conversion
        width = conversion.dense.element_bytes
        row_bytes = conversion.dense.rows * width
        for block in self._merged_blocks():
            if conversion.turned:
                part = slice(block.rows.start * width, block.rows.stop * width)
                columns = turned(block.dense, len(block.rows), width)
                self._outlet.put_columns(conversion.name, columns, row_bytes, part)
            else:
                self._outlet.append(conversion.name, block.dense)

    def _store_quantized(self, quantizer: Quantizer) -> None:
        """Quantize the matrix while reading it."""
        import torch

        scales: list[torch.Tensor] = []
        for stretch in self._stretches(self._unmerged(digest=True), quantizer.unit):
            scales.append(self._measured(quantizer, stretch))
            self._outlet.append(self._codes, quantizer.codes(stretch.numbers, scales[-1]))
        self._write_parts(quantizer, torch.cat(scales))

    def _store_merged_quantized(self, quantizer: Quantizer) -> None:
        """Merge, then choose the nearest codes under the scales as they will be decoded.

        A quantizer may choose codes before it quantizes the scales. The rounding of the scales is small relative to a weight but
        large relative to an update, so codes that compensate for it keep more of the update. The matrix is read twice.
        """
        import torch

        first = self._stretches(self._merged(digest=True), quantizer.unit)
        measured = [self._measured(quantizer, stretch) for stretch in first]
        scales = quantizer.scales(self._write_parts(quantizer, torch.cat(measured)))
        self.delivery = DeliveryCount()
        second = self._stretches(self._merged(digest=False), quantizer.unit)
        for stretch, here in zip(second, torch.split(scales, [len(each) for each in measured]), strict=True):
            codes = quantizer.codes(stretch.numbers, here)
            self._outlet.append(self._codes, codes)
            self._count(self.delivery, quantizer, stretch, codes, here)
        self._differs = self.delivery.moved

    def _count(self, delivery: DeliveryCount, quantizer: Quantizer, stretch: _Stretch, codes: torch.Tensor,
               scales: torch.Tensor) -> None:  # fmt: skip
        """Compare the codes of a stretch with those that it would have without the merge.

        Both have the same scales, so that only the update makes a difference. Numbers that shrink far have their own scales
        before the merge, because those of the merged numbers would cut them off.
        """
        import torch

        count = len(stretch.originals)
        own = quantizer.measure(stretch.originals)
        before = torch.where(own > SHRUNK * quantizer.measure(stretch.numbers), own, scales)
        image = quantizer.decode(quantizer.codes(stretch.originals, before), before, count)
        wanted = stretch.numbers.sub(stretch.originals).add_(image)
        delivery.add(image[None], wanted[None], quantizer.decode(codes, scales, count)[None])

    def _store_merged_image(self, quantizer: Quantizer, target: Target) -> None:
        """Quantize the matrix, then change its codes as a merge into the quantized model would.

        The matrix is read twice, because the scales depend on all of it.
        """
        import torch

        first = self._stretches(self._unmerged(digest=True), quantizer.unit)
        measured = [self._measured(quantizer, stretch) for stretch in first]
        image = quantizer.image(self._write_parts(quantizer, torch.cat(measured)), self._outlet.info(self._codes))
        merge = Merge(target.upright(image), choose_device(self._device))
        second = self._stretches(self._unmerged(digest=False), quantizer.unit)
        codes = (quantizer.codes(stretch.numbers, here) for stretch, here in zip(second, measured, strict=True))
        blocks = list(merge.blocks())
        sizes = [stop - start for rows in blocks for _, start, stop in image.extents(rows)]
        for rows, part in zip(blocks, _recut(codes, sizes), strict=True):
            merge.change(rows, (part,))
            self._outlet.append(self._codes, part)
        self.delivery, self._differs = merge.delivery, merge.delivery.moved

    @property
    def _codes(self) -> str:
        """The name of the tensor that holds the codes."""
        return self._conversion.outcome[0].name

    def _write_parts(self, quantizer: Quantizer, measured: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Write every tensor except the codes, and return what was written."""
        import torch

        parts = quantizer.parts(measured)
        for name, part in parts.items():
            self._outlet.append(name, part.contiguous().view(-1).view(torch.uint8))
        return parts

    def _measured(self, quantizer: Quantizer, stretch: _Stretch) -> torch.Tensor:
        """Measure the scales of a stretch, fp32."""
        scales = quantizer.measure(stretch.numbers)
        if not scales.isfinite().all():
            raise CheckpointError(
                f"{quoted(self._conversion.name)} in {quoted(self._conversion.source.tensors[0].file)} holds NaN or "
                "infinity, which cannot be quantized; download the model again"
            )
        return scales

    def _merged_blocks(self) -> Iterator[_Block]:
        """Yield the intermediate matrix block by block, with the updates merged if there are any."""
        target = self._conversion.merge
        if target is None:
            yield from self._blocks(digest=True)
            return
        merge = self._merge(target)
        for block in self._blocks(digest=True, cut=merge.blocks()):
            original = None if self._differs else block.dense.clone()
            merge.change(block.rows, (block.dense,))
            self._differs = original is None or not original.equal(block.dense)
            yield block
        self.delivery = merge.delivery

    def _merge(self, target: Target) -> Merge:
        """Return the arithmetic of the updates; if they depend on the whole intermediate matrix, read it once before."""
        import torch

        merge = Merge(target, choose_device(self._device))
        if merge.measures:
            for block in self._blocks(digest=False, cut=merge.blocks()):
                numbers = elements(block.dense, self._conversion.dense).to(target.weight.dtype.as_torch())
                merge.measure(block.rows, (numbers.view(torch.uint8),))
        return merge

    def _blocks(self, *, digest: bool, cut: Iterable[range] | None = None) -> Iterator[_Block]:
        """Yield the intermediate matrix block by block, as in the base; with `digest`, hash the bytes read."""
        rows, columns = self._conversion.dense.rows, self._conversion.dense.columns
        read = Reader(self._conversion, self._sources, self._read_digest if digest else None)
        for block in cut or row_blocks(rows, columns * 4):
            if self._stop.is_set():
                raise _Stopped
            dense = read.rows(block)
            self._progress(self._conversion.nbytes * len(block) // rows)
            yield _Block(block, dense)

    def _unmerged(self, *, digest: bool) -> Iterator[_Stretch]:
        """Yield the elements of the intermediate matrix, as in the base."""
        for block in self._blocks(digest=digest):
            numbers = elements(block.dense, self._conversion.dense).float()
            yield _Stretch(numbers, numbers)

    def _merged(self, *, digest: bool) -> Iterator[_Stretch]:
        """Yield the elements of the intermediate matrix, merged and not rounded.

        Raises:
            AdapterError: one exceeds the dtype of the base, which the new matrix decodes to.
        """
        import torch

        target, dense = self._conversion.merge, self._conversion.dense
        assert target is not None
        merge = self._merge(target)
        for block in self._blocks(digest=digest, cut=merge.blocks()):
            originals = elements(block.dense, dense).float()
            numbers = originals.clone()
            merge.change(block.rows, (numbers.view(torch.uint8),))
            if numbers.abs().amax() >= dense.limit and originals.isfinite().all():
                raise overflow(dense.name, block.rows, dense.storage, scalable=merge.scalable)
            yield _Stretch(numbers, originals)

    def _stretches(self, parts: Iterable[_Stretch], blocksize: int) -> Iterator[_Stretch]:
        """Yield the same elements cut into whole blocks that share a scale; these need not end where rows end."""
        import torch

        rest = _Stretch(torch.empty(0), torch.empty(0))
        for part in parts:
            joined = rest.followed_by(part)
            whole = len(joined.numbers) // blocksize * blocksize
            for start in range(0, whole, STRETCH):
                yield joined[start : min(start + STRETCH, whole)]
            rest = joined[whole:].copied()
        if len(rest.numbers):
            yield rest


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows of the intermediate matrix, as uint8 bytes."""

    rows: range
    dense: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Elements of the intermediate matrix, fp32, and their values before the merge, which may be the same tensor."""

    numbers: torch.Tensor
    originals: torch.Tensor

    def __getitem__(self, part: slice) -> _Stretch:
        return _Stretch(self.numbers[part], self.originals[part])

    def followed_by(self, other: _Stretch) -> _Stretch:
        import torch

        if not len(self.numbers):
            return other
        numbers = torch.cat([self.numbers, other.numbers])
        if other.originals is other.numbers:
            return _Stretch(numbers, numbers)
        return _Stretch(numbers, torch.cat([self.originals, other.originals]))

    def copied(self) -> _Stretch:
        return _Stretch(self.numbers.clone(), self.originals.clone())


def _recut(parts: Iterator[torch.Tensor], sizes: Iterable[int]) -> Iterator[torch.Tensor]:
    """Yield the same uint8 bytes in parts of `sizes`."""
    import torch

    rest = torch.empty(0, dtype=torch.uint8)
    for size in sizes:
        pieces, length = [rest], len(rest)
        while length < size:
            pieces.append(next(parts))
            length += len(pieces[-1])
        rest = torch.cat(pieces)
        yield rest[:size]
        rest = rest[size:]
