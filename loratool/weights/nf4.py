"""Quantizing a dense matrix to NF4, with the same bits as bitsandbytes on a CPU.

The arithmetic is that of bitsandbytes 0.50:

- Codes are those of ``quantize_4bit`` of its default backend. The numbers of a block are multiplied by the reciprocal of
  their largest magnitude; those of an incomplete last block are divided by it. Each gets the code of the nearest value, or
  the lower of two equally near ones. bitsandbytes uses the magnitude before it is quantized.
- Scales with double quantization are those of ``quantize_blockwise`` of its C++ kernel, ``csrc/cpu_ops.cpp``, applied to the
  scales minus their mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.dtypes import Dtype, of_torch
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.json_text import parse_json
from loratool.checkpoint.layout import NewTensor
from loratool.errors import CheckpointError, LoratoolError, quoted
from loratool.weights.coarse.machine import LoadedCoarse
from loratool.weights.four_bit import NF4, STATE, FourBitWeight, QuantState, nested_scales, parse_state
from loratool.weights.making import Option

if TYPE_CHECKING:
    import torch

BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes has, in elements."""

NESTED_BLOCKSIZE: Final = 256
LEAST_SCALE: Final = 1e-38
"""The smallest number that a block is divided by."""

ZERO: Final = 7
"""The code of 0.0."""

OFFSET_CHARACTERS: Final = 24
"""The longest text of an fp32 number in JSON. All texts of a state have the same length, whatever the offset, because the
header with this length is written before the matrix is read."""

CELLS: Final = 1024
"""Number of equal cells from -1 to 1, the middles of the outer ones. None holds two boundaries between codes."""

WHOLE: Final = 0x4B000000
"""The bits of the fp32 number 2**23 (IEEE 754 binary32)."""

PLACES: Final = 65535
"""Number of steps from -1 to 1 to which the C++ kernel rounds a scale before it looks up the nearest value."""


@dataclass(frozen=True, slots=True)
class Nf4Options:
    """Options of quantization: elements per scale, and whether the scales are quantized themselves."""

    blocksize: int = 64
    double_quant: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Option]) -> Nf4Options:
        """Return these options with defaults for the others; raise LoratoolError for a block size that bitsandbytes lacks."""
        made = cls(**{"blocksize": 64, "double_quant": True} | dict(options))  # type: ignore[arg-type]
        if made.blocksize not in BLOCKSIZES:
            sizes = ", ".join(map(str, BLOCKSIZES))
            raise LoratoolError(f"the block size is {quoted(made.blocksize)} and must be one of {sizes}")
        return made

    @property
    def storage(self) -> str:
        return "nf4"

    @property
    def title(self) -> str:
        return "NF4"

    @property
    def options(self) -> Mapping[str, Option]:
        return {"blocksize": self.blocksize, "double_quant": self.double_quant}

    def parameter(self, name: str, shape: tuple[int, int], dtype: Dtype) -> Nf4Layout:
        return Nf4Layout(name, shape, dtype.torch_name, self)

    def quantization_config(self, compute_dtype: str, dense: Collection[str] | None) -> dict[str, Any]:
        """Return what transformers 5 writes for a ``BitsAndBytesConfig``."""
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.storage,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None if dense is None else sorted(dense),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }


@dataclass(frozen=True, slots=True)
class Nf4Layout:
    """The tensors in which a matrix `name` of `shape` is stored. It decodes to `dtype`, torch's name of it."""

    name: str
    shape: tuple[int, int]
    dtype: str
    options: Nf4Options

    @property
    def storage(self) -> str:
        return self.options.storage

    @property
    def tensors(self) -> tuple[NewTensor, ...]:
        """Codes and scales, with bitsandbytes' names, dtypes and shapes."""
        count = self.shape[0] * self.shape[1]
        blocks = -(-count // self.options.blocksize)
        parts = [
            NewTensor(self.name, "U8", (-(-count // 2), 1)),
            NewTensor(f"{self.name}.quant_map", "F32", (16,)),
            NewTensor(self.state_name, "U8", (len(self.state(0.0)),)),
            NewTensor(f"{self.name}.absmax", "U8" if self.options.double_quant else "F32", (blocks,)),
        ]
        if self.options.double_quant:
            parts.append(NewTensor(f"{self.name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCKSIZE),)))
            parts.append(NewTensor(f"{self.name}.nested_quant_map", "F32", (256,)))
        return tuple(parts)

    def quantizer(self) -> Nf4Quantizer:
        return Nf4Quantizer(self)

    @property
    def state_name(self) -> str:
        return f"{self.name}{STATE}nf4"

    def state(self, offset: float) -> bytes:
        """Return the JSON of bitsandbytes' quant_state, padded with spaces to a fixed length."""
        value: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": self.options.blocksize,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        if not self.options.double_quant:
            return json.dumps(value).encode()
        value |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
        padding = OFFSET_CHARACTERS - len(json.dumps(offset))
        return (json.dumps(value) + " " * padding).encode()


@dataclass(frozen=True, slots=True)
class Nf4Image(FourBitWeight):
    """A quantized matrix that is not in a file yet. Its scales, fp32, one per block, are in memory."""

    absmax: torch.Tensor

    def load(self, device: str) -> LoadedCoarse:
        return self.loaded(self.absmax.to(device))


class Nf4Quantizer:
    """Rounds stretches of a matrix to the nearest codes. Threads may share it."""

    def __init__(self, layout: Nf4Layout) -> None:
        import torch

        self._layout, self._blocksize = layout, layout.options.blocksize
        values = torch.tensor(NF4)
        # The two fp32 values of a byte, looked up as one 64-bit integer.
        self._pairs = torch.cartesian_prod(values, values).view(torch.int64).view(256)
        bounds = (values[:-1] + values[1:]) / 2
        # A number in a cell is above all bounds below the cell, and may be above the next one.
        edges = (torch.arange(CELLS + 1, dtype=torch.float64) - 0.5) * (2 / CELLS) - 1
        self._below = torch.searchsorted(bounds.double(), edges).to(torch.uint8)
        self._next = torch.cat([bounds, torch.tensor([torch.inf])])[self._below.long()]

    @property
    def unit(self) -> int:
        return self._blocksize

    def measure(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude of each block."""
        import torch

        whole = len(numbers) // self._blocksize * self._blocksize
        absmax = numbers[:whole].view(-1, self._blocksize).abs().amax(1)
        if whole == len(numbers):
            return absmax
        return torch.cat([absmax, numbers[whole:].abs().amax().clamp(min=LEAST_SCALE)[None]])

    def codes(self, numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the codes in bytes. Under a scale below zero, which double quantization gives a tiny block, they are zero."""
        import torch

        whole = len(numbers) // self._blocksize * self._blocksize
        blocks = numbers[:whole].view(-1, self._blocksize)
        scales = torch.where(scales < 0, math.inf, scales)
        reciprocals = 1.0 / scales[: len(blocks)].clamp(min=LEAST_SCALE)
        scaled = torch.empty_like(numbers)
        torch.mul(blocks, reciprocals[:, None], out=scaled[:whole].view(blocks.shape))
        if whole < len(numbers):
            torch.div(numbers[whole:], scales[-1].clamp(min=LEAST_SCALE), out=scaled[whole:])
        return _packed(self._nearest(scaled.clamp_(-1, 1)))

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, count: int) -> torch.Tensor:
        import torch

        numbers = self._pairs.index_select(0, codes.int()).view(torch.float32)[:count]
        whole = count // self._blocksize * self._blocksize
        numbers[:whole].view(-1, self._blocksize).mul_(scales[: whole // self._blocksize, None])
        numbers[whole:].mul_(scales[-1])
        return numbers

    def parts(self, measured: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return the tensors besides the codes. The rounding of a mean depends on the number of torch's threads."""
        import torch

        layout, name = self._layout, self._layout.name
        parts = {f"{name}.quant_map": torch.tensor(NF4)}
        offset = 0.0
        if layout.options.double_quant:
            mean = measured.mean()
            offset = mean.item()
            codes, outer = _quantize_scales(measured - mean)
            again = nested_scales(codes, dynamic_map(), outer, NESTED_BLOCKSIZE, offset)
            if not again.to(of_torch(layout.dtype).as_torch()).isfinite().all():
                raise CheckpointError(
                    f"the numbers of {quoted(name)} are so large that their scales in 8 bits are beyond {layout.dtype}; "
                    "`loratool quantize --no-double-quant` stores them in fp32"
                )
            parts[f"{name}.absmax"] = codes
            parts[f"{name}.nested_absmax"] = outer
            parts[f"{name}.nested_quant_map"] = dynamic_map()
        else:
            parts[f"{name}.absmax"] = measured
        parts[layout.state_name] = torch.frombuffer(bytearray(layout.state(offset)), dtype=torch.uint8)
        return parts

    def scales(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        state, name = self._state(parts), self._layout.name
        scales = parts[f"{name}.absmax"]
        if state.nested_blocksize is None:
            return scales
        values, outer = (parts[f"{name}.{part}"] for part in ("nested_quant_map", "nested_absmax"))
        return nested_scales(scales, values, outer, state.nested_blocksize, state.nested_offset)

    def image(self, parts: Mapping[str, torch.Tensor], codes: TensorInfo) -> Nf4Image:
        return Nf4Image(self._layout.name, self._state(parts), codes, {}, self.scales(parts))

    def _state(self, parts: Mapping[str, torch.Tensor]) -> QuantState:
        return parse_state(parse_json(bytes(parts[self._layout.state_name].tolist())), "nf4")

    def _nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """Return the code nearest to each number from -1 to 1: the number of bounds between codes that are below it."""
        import torch

        # fp32 numbers from 2**23 on are integers, so the sum is rounded to a cell, whose number is in its last bits. That is
        # several times faster than a conversion to integers.
        cell = scaled.mul(CELLS // 2).add_(2.0**23 + CELLS // 2).view(torch.int32).sub_(WHOLE)
        above = scaled > self._next.index_select(0, cell)
        return self._below.index_select(0, cell).add_(above.view(torch.uint8))


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Return two codes per byte, the first in the upper half."""
    import torch

    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_full((1,), ZERO)])
    pairs = codes.view(torch.int16)  # the first code is the lower byte
    return ((pairs << 4) + (pairs >> 8)).to(torch.uint8)


@cache
def dynamic_map() -> torch.Tensor:
    """Return the 256 values of quantized scales, fp32, sorted: signed dynamic 8-bit numbers.

    Sources: Dettmers 2015, arXiv:1511.04561; bitsandbytes' ``create_dynamic_map``.
    """
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (exponent - 6) * middles).tolist()
        values += (-(10.0 ** (exponent - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 8-bit codes of `scales`, fp32 with their mean subtracted, and the largest magnitude of every 256."""
    import torch

    padded = torch.nn.functional.pad(scales, (0, -len(scales) % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(1)
    unit = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    # The kernel computes ((unit + 1) / 2) * 65535 + 0.5 with one rounding of the last two steps; fp64 is exact there.
    place = (unit.add_(1).mul_(0.5).double() * PLACES + 0.5).float().nan_to_num_(0).to(torch.int32)
    values = dynamic_map()
    codes = torch.bucketize(place.mul(2.0) / PLACES - 1, (values[:-1] + values[1:]) * 0.5).to(torch.uint8)
    codes[absmax == 0] = 0
    return codes.view(-1)[: len(scales)].clone(), absmax
