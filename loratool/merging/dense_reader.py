"""Reading the intermediate dense matrix of a conversion from the base, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from loratool.checkpoint.blocks import read_columns, read_exactly
from loratool.merging.conversion_plan import Conversion
from loratool.merging.stream import bytes_of
from loratool.weights.dense import DenseWeight
from loratool.weights.storages import is_dense

if TYPE_CHECKING:
    import torch


class Reader:
    """Reads rows of the intermediate matrix from the base's files, and hashes what it reads into `digest`."""

    def __init__(self, conversion: Conversion, sources: Mapping[Path, int], digest: blake3 | None) -> None:
        self._conversion, self._sources, self._digest = conversion, sources, digest
        self._stored_weight = None if is_dense(conversion.source) else conversion.source.load("cpu")

    def rows(self, rows: range) -> torch.Tensor:
        """Read some rows, as uint8 bytes."""
        if self._stored_weight is not None:
            return self._decoded(rows)
        if self._conversion.turned:
            return self._turned_columns(rows)
        (raw,) = self._stored(rows)
        return raw

    def _stored(self, rows: range) -> tuple[torch.Tensor, ...]:
        """Read the bytes of some rows as stored in the base, one part for each extent."""
        import torch

        parts = []
        for info, start, stop in self._conversion.source.extents(rows):
            raw = torch.empty(stop - start, dtype=torch.uint8)
            read_exactly(self._sources[info.file], bytes_of(raw), start)
            if self._digest is not None:
                self._digest.update(bytes_of(raw))
            parts.append(raw)
        return tuple(parts)

    def _turned_columns(self, rows: range) -> torch.Tensor:
        import torch

        outputs, inputs = self._conversion.dense.rows, self._conversion.dense.columns
        width = self._conversion.dense.element_bytes
        (info,) = self._conversion.source.tensors
        raw = torch.empty(inputs * len(rows) * width, dtype=torch.uint8)
        part = slice(rows.start * width, rows.stop * width)
        read_columns(self._sources[info.file], bytes_of(raw), info.start, outputs * width, part)
        return turned(raw, inputs, width)

    def _decoded(self, rows: range) -> torch.Tensor:
        import torch

        assert self._stored_weight is not None
        dense = self._conversion.dense
        block = torch.empty(len(rows), dense.columns)
        self._stored_weight.decode(rows, self._stored(rows), block)
        raw = torch.empty(block.numel() * dense.element_bytes, dtype=torch.uint8)
        elements(raw, dense).copy_(block.view(-1))
        return raw


def elements(raw: torch.Tensor, dense: DenseWeight) -> torch.Tensor:
    """Return the bytes of a dense matrix as its elements, flat."""
    return raw.view(dense.dtype.as_torch())


def turned(raw: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Return the bytes of the transpose of a matrix of `rows` rows, whose elements have `width` bytes."""
    import torch

    integer = {2: torch.int16, 4: torch.int32}[width]
    return raw.view(integer).view(rows, -1).T.contiguous().view(-1).view(torch.uint8)
