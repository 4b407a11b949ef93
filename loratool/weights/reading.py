"""Reading the small tensors of a parameter, such as scales, in one piece."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import TensorInfo
from loratool.errors import CheckpointError, quoted

if TYPE_CHECKING:
    import torch


def read_bytes(info: TensorInfo) -> bytearray:
    """Return the bytes of a small tensor.

    Raises:
        CheckpointError: the file cannot be read, or became shorter.
    """
    buffer = bytearray(info.nbytes)
    try:
        fd = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {quoted(info.file)}: {error.strerror}") from None
    try:
        read_exactly(fd, memoryview(buffer), info.start)
    finally:
        os.close(fd)
    return buffer


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Return a small tensor on the CPU, flat, in its own dtype."""
    import torch

    dtype = DTYPES[info.dtype].as_torch()
    return torch.frombuffer(read_bytes(info), dtype=dtype) if info.nbytes else torch.empty(0, dtype=dtype)


def read_scales(info: TensorInfo) -> torch.Tensor:
    """Return a tensor of scales, flat, fp32.

    Raises:
        CheckpointError: a scale is NaN or infinite.
    """
    scales = read_tensor(info).float()
    refuse_not_finite(scales, info.name, info)
    return scales


def refuse_not_finite(scales: torch.Tensor, name: str, info: TensorInfo) -> None:
    """Raise CheckpointError if a scale of the parameter `name`, in the file of `info`, is NaN or infinite."""
    if not scales.isfinite().all():
        raise CheckpointError(
            f"the scales of {quoted(name)} in {quoted(info.file)} hold NaN or infinity; download the model again"
        )
