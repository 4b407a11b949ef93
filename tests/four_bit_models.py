"""4-bit models as transformers and bitsandbytes make them, and what they store, read without either."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from numpy.typing import NDArray
from tiny_models import ARCHITECTURES, DTYPES, StoredTensor, stored_tensors

from loratool.weights.four_bit import STATE

NF4_VALUES = bnb.get_4bit_type("nf4", device="cpu").double().numpy()


def save_by_transformers(
    model: Path, folder: Path, architecture: str, dtype: str, *, double_quant: bool = True
) -> Path:
    """Load a dense model with a BitsAndBytesConfig and save it, both by transformers."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    loader = ARCHITECTURES[architecture].auto
    loader.from_pretrained(model, dtype="auto", quantization_config=config).save_pretrained(folder)
    return folder


def four_bit_names(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of the matrices in 4 bits."""
    return sorted(name for name in tensors if f"{name}{STATE}nf4" in tensors)


def without_padding(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | dict[str, Any]]:
    """The stored tensors, with each quant_state as what its JSON says."""
    return {name: json.loads(tensor.data) if STATE in name else tensor for name, tensor in tensors.items()}


def decoded_by_bitsandbytes(folder: Path) -> dict[str, torch.Tensor]:
    """Every 4-bit matrix of a model, as bitsandbytes decodes it, in the dtype of its state.

    Its kernel for CPUs takes the scale of the wrong block where a row is no whole number of blocks, which its plain
    implementation, and its kernel for CUDA, do not.
    """
    tensors = stored_tensors(folder)
    return {name: _decoded(name, tensors) for name in four_bit_names(tensors)}


def _decoded(name: str, tensors: Mapping[str, StoredTensor]) -> torch.Tensor:
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict({key: _as_torch(part) for key, part in parts.items()}, torch.device("cpu"))
    codes = _as_torch(tensors[name])
    if state.shape[1] % state.blocksize == 0:
        return bnb.dequantize_4bit(codes, state)
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    values = bnb.get_4bit_type(state.quant_type, device="cpu")
    return _dequantize_4bit_compute(codes.view(-1), scales, values, state.blocksize, state.shape, state.dtype)


def codes_apart(one: bytes, other: bytes) -> float:
    """The share of codes, two a byte, that differ."""
    apart = [a ^ b for a, b in zip(one, other, strict=True)]
    return sum(((byte >> 4) != 0) + ((byte & 15) != 0) for byte in apart) / (2 * len(apart))


def _as_torch(tensor: StoredTensor) -> torch.Tensor:
    dtype = {"U8": torch.uint8, "F32": torch.float32}[tensor.dtype]
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(tensor.shape)


@dataclass(frozen=True)
class Coded:
    """A matrix as its codes, in float64: `units`, what they stand for under a scale of one, and `scales`, one an element."""

    units: NDArray[np.float64]
    scales: NDArray[np.float64]

    def nearest(self, weight: torch.Tensor) -> NDArray[np.float64]:
        """What `weight` is under these scales when every code is the nearest, in units of them."""
        wanted = weight.double().numpy() / self.scales
        return NF4_VALUES[np.abs(wanted[..., None] - NF4_VALUES).argmin(-1)]

    def off_by(self, weight: torch.Tensor) -> NDArray[np.float64]:
        """How much farther from `weight` each code is than the nearest one, in units of its scale."""
        wanted = weight.double().numpy() / self.scales
        return np.abs(self.units - wanted) - np.abs(self.nearest(weight) - wanted)


def coded(tensors: Mapping[str, StoredTensor], name: str) -> Coded:
    """A doubly quantized NF4 matrix of a model."""
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict({key: _as_torch(part) for key, part in parts.items()}, torch.device("cpu"))
    scales = (bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset).double().numpy()
    raw = np.frombuffer(tensors[name].data, np.uint8)
    count = int(np.prod(state.shape))
    codes = np.stack([raw >> 4, raw & 15], 1).reshape(-1)[:count]
    return Coded(NF4_VALUES[codes].reshape(state.shape), scales.repeat(state.blocksize)[:count].reshape(state.shape))
