"""The storage of bitsandbytes' 4-bit matrices: NF4 (Dettmers et al. 2023, arXiv:2305.14314) and FP4.

A matrix ``X.weight`` of n elements is a tensor of ``ceil(n / 2)`` bytes with two codes each, the first in the upper half. A
code is an index into 16 values from -1 to 1. Every `blocksize` elements share a scale, their largest magnitude
(``X.weight.absmax``). With double quantization the scales are bytes themselves: indices into 256 values
(``.nested_quant_map``), times one scale per `nested_blocksize` of them (``.nested_absmax``), plus one offset.
``X.weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``) is JSON with the sizes and the dtype that the matrix decodes to.

Sources: bitsandbytes' ``QuantState.as_dict(packed=True)`` for the layout, and its ``dequantize_4bit`` for the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.dtypes import DENSE, DTYPES, Dtype, of_torch
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.json_text import parse_json_object
from loratool.errors import CheckpointError, quoted
from loratool.weights.coarse.block import Coding
from loratool.weights.coarse.by_block import ByBlock
from loratool.weights.coarse.levels import Levels
from loratool.weights.coarse.machine import LoadedCoarse
from loratool.weights.coarse.packing import Bytes
from loratool.weights.coarse.short_steps import ShortRule
from loratool.weights.coarse.stored import CoarseWeight
from loratool.weights.coarse.tiles import Area, FlatTiles, Scaling
from loratool.weights.reading import read_bytes, read_tensor, refuse_not_finite
from loratool.weights.storage import Model, Storage

if TYPE_CHECKING:
    import torch

STATE: Final = ".quant_state.bitsandbytes__"
KINDS: Final = ("nf4", "fp4")
NF4: Final = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
              0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
FP4: Final = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
              0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25)  # fmt: skip
LEVELS: Final = MappingProxyType({"nf4": Levels(NF4), "fp4": Levels(FP4, twins_apart=True)})
"""The value of each code in bitsandbytes."""

SHORT_RULES: Final = MappingProxyType(
    {
        "nf4": (ShortRule(0.01, 0.086), ShortRule(0.03, 0.095), ShortRule(0.1, 0.11), ShortRule(math.inf, math.inf)),
        "fp4": (),
    }
)
"""The steps that carry a small change: a quarter of all, two fifths, three fifths, or all (docs/nf4-merge.md)."""

LARGEST_STATE: Final = 1 << 16
DECODED: Final = tuple(DTYPES[name].torch_name for name in DENSE)
"""Torch's names of the dtypes that matrices decode to."""


@dataclass(frozen=True, slots=True)
class QuantState:
    """The parsed quant_state of a matrix: its shape, block size and dtype, and those of its scales if they are quantized."""

    kind: str
    shape: tuple[int, int]
    blocksize: int
    dtype: str
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class FourBitWeight(CoarseWeight):
    """A matrix of shape (rows, columns) in 4 bits. `parts` are its other tensors, by the suffix after its name."""

    name: str
    state: QuantState
    codes: TensorInfo
    parts: Mapping[str, TensorInfo]

    @property
    def storage(self) -> str:
        return self.state.kind

    @property
    def words(self) -> str:
        return "in 4 bits"

    @property
    def dtype(self) -> Dtype:
        return of_torch(self.state.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.state.shape

    @property
    def rows(self) -> int:
        return self.state.shape[0]

    @property
    def columns(self) -> int:
        return self.state.shape[1]

    @property
    def row_step(self) -> int:
        """2 if a row has an odd number of codes, since two codes share a byte; otherwise 1."""
        return 1 + self.columns % 2

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.codes,)

    @property
    def siblings(self) -> tuple[TensorInfo, ...]:
        return tuple(self.parts.values())

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        columns = self.shape[1]
        start, stop = rows.start * columns // 2, -(-rows.stop * columns // 2)
        return ((self.codes, self.codes.start + start, self.codes.start + stop),)

    def load(self, device: str) -> LoadedCoarse:
        """Read the scales.

        Raises:
            CheckpointError: a scale is NaN or infinite, or the stored values of the codes are not those of NF4 or FP4.
        """
        return self.loaded(_read_scales(self).to(device))

    def loaded(self, scales: torch.Tensor) -> LoadedCoarse:
        """Return the matrix with these scales, fp32, one per block."""
        import torch

        # Codes in a block of zeros do not change. Double quantization may give it a tiny scale of either sign.
        still = scales < torch.finfo(torch.float32).tiny
        scaling = Scaling.of(FlatTiles(self.state.blocksize, self.columns), scales, still=still)
        coding = Coding(LEVELS[self.state.kind], Bytes(per_byte=2, high_first=True), self.dtype)
        everything = Area(range(self.rows), range(self.columns))
        habit = partial(ByBlock, scaling=scaling, area=everything, rules=SHORT_RULES[self.state.kind])
        return LoadedCoarse(self, coding, scaling, str(scales.device), habit)


def claim(model: Model, name: str) -> FourBitWeight | None:
    """Return the 4-bit matrix called `name`, or None if there is none. Of its tensors, only the quant_state is read.

    Raises:
        CheckpointError: the tensors of the matrix are missing, damaged or contradictory.
    """
    tensors = model.tensors
    kinds = [kind for kind in KINDS if name + STATE + kind in tensors]
    if name not in tensors or not kinds:
        return None
    info = tensors[name + STATE + kinds[0]]
    try:
        state = parse_state(json_of(info), kinds[0])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is damaged; download the model again"
        ) from None
    parts = {part: tensors[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in tensors}
    parts[info.name.removeprefix(f"{name}.")] = info
    weight = FourBitWeight(name, state, tensors[name], parts)
    _check_sizes(weight)
    return weight


_PARTS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def parameter_of(tensor: str) -> str | None:
    """Return the matrix that a tensor belongs to if its name is one that only 4-bit matrices have, or None."""
    ends = (*(STATE + kind for kind in KINDS), *(f".{part}" for part in _PARTS))
    return next((tensor.removesuffix(end) for end in ends if tensor.endswith(end)), None)


def describes(config: Mapping[str, Any]) -> str | None:
    """Return the title of the storage if a ``quantization_config`` describes a model in 4 bits, or None."""
    is_it = _is_bitsandbytes(config) and not is_8_bit(config)
    return str(config.get("bnb_4bit_quant_type", "fp4")).upper() if is_it else None


def is_8_bit(config: Mapping[str, Any]) -> bool:
    """Return whether a ``quantization_config`` describes a model in bitsandbytes' 8 bits."""
    return _is_bitsandbytes(config) and bool(config.get("load_in_8bit") or config.get("_load_in_8bit"))


def _is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    return str(config.get("quant_method", "bitsandbytes")) == "bitsandbytes"


STORAGE: Final = Storage(
    names=KINDS,
    title="bitsandbytes NF4 and FP4",
    claim=claim,
    parameter_of=parameter_of,
    describes=describes,
    tags=("4-bit", "bitsandbytes"),
)


def json_of(info: TensorInfo) -> dict[str, Any]:
    """Parse the bytes of a tensor as a JSON object; raise CheckpointError if they are not one."""
    if info.dtype != "U8" or info.nbytes > LARGEST_STATE:
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is not a quant_state; download the model again"
        )
    try:
        return parse_json_object(bytes(read_bytes(info)), info.file)
    except CheckpointError:
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is not valid JSON; download the model again"
        ) from None


def parse_state(value: Mapping[str, Any], kind: str) -> QuantState:
    """Parse the JSON of a quant_state; raise KeyError, TypeError or ValueError if a value is missing or invalid."""

    def whole(key: str) -> int:
        if type(value[key]) is not int or not 0 < value[key] <= 1 << 20:
            raise ValueError(key)
        return int(value[key])

    rows, columns = value["shape"]
    if not all(type(side) is int and 0 < side < 1 << 40 for side in (rows, columns)):
        raise ValueError("shape")
    if value["dtype"] not in DECODED or value["quant_type"] != kind:
        raise ValueError("dtype")
    if "nested_blocksize" not in value:
        return QuantState(kind, (rows, columns), whole("blocksize"), value["dtype"])
    offset = value["nested_offset"]
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise ValueError("nested_offset")
    return QuantState(
        kind, (rows, columns), whole("blocksize"), value["dtype"], whole("nested_blocksize"), float(offset)
    )


def _check_sizes(weight: FourBitWeight) -> None:
    """Raise CheckpointError unless every tensor of the matrix is present with the right dtype and size."""
    state, nested = weight.state, weight.state.nested_blocksize is not None
    count = state.shape[0] * state.shape[1]
    blocks = -(-count // state.blocksize)
    expected: dict[str, tuple[str, int]] = {"absmax": ("U8", blocks) if nested else ("F32", 4 * blocks)}
    if nested:
        assert state.nested_blocksize is not None
        expected["nested_absmax"] = ("F32", 4 * -(-blocks // state.nested_blocksize))
        expected["nested_quant_map"] = ("F32", 4 * 256)
    for part, (dtype, nbytes) in expected.items():
        info = weight.parts.get(part)
        if info is None:
            raise CheckpointError(
                f"{quoted(weight.name)} in {quoted(weight.codes.file)} is stored in 4 bits, but its {quoted(part)} is "
                "missing; download the model again"
            )
        _check_size(info, dtype, nbytes)
    _check_size(weight.codes, weight.codes.dtype, -(-count // 2))
    if "quant_map" in weight.parts:
        _check_size(weight.parts["quant_map"], "F32", 4 * 16)


def _check_size(info: TensorInfo, dtype: str, nbytes: int) -> None:
    if (info.dtype, info.nbytes) != (dtype, nbytes):
        raise CheckpointError(
            f"{quoted(info.name)} in {quoted(info.file)} is {info.dtype} of {info.nbytes} bytes, but its quant_state asks "
            f"for {dtype} of {nbytes}; download the model again"
        )


def _read_scales(weight: FourBitWeight) -> torch.Tensor:
    """Return the scale of every block, fp32, as bitsandbytes computes it."""
    import torch

    if "quant_map" in weight.parts:
        values = read_tensor(weight.parts["quant_map"])
        if not torch.equal(values, torch.tensor(LEVELS[weight.state.kind].values)):
            raise CheckpointError(
                f"{quoted(weight.name)}.quant_map in {quoted(weight.codes.file)} does not hold the values of "
                f"{weight.state.kind}; such models are not supported"
            )
    if weight.state.nested_blocksize is None:
        scales = read_tensor(weight.parts["absmax"])
    else:
        indices = read_tensor(weight.parts["absmax"])
        values, outer = (read_tensor(weight.parts[part]) for part in ("nested_quant_map", "nested_absmax"))
        scales = nested_scales(indices, values, outer, weight.state.nested_blocksize, weight.state.nested_offset)
    refuse_not_finite(scales, weight.name, weight.codes)
    return scales


def nested_scales(indices: torch.Tensor, values: torch.Tensor, outer: torch.Tensor, blocksize: int,
                  offset: float) -> torch.Tensor:  # fmt: skip
    """Return decoded scales, fp32: ``values[indices] * outer + offset``, where every `blocksize` scales share one `outer`."""
    scales = values[indices.int()]
    return scales.mul_(outer.repeat_interleave(blocksize)[: len(scales)]).add_(offset)
