"""FP8: E4M3 numbers with one scale per matrix, per output, or per tile of 128 x 128.

A matrix ``X.weight`` (out, in) is a tensor of torch's float8_e4m3fn. Two libraries store its scales:

- Fine-grained FP8 of DeepSeek and Qwen (transformers, ``quant_method: fp8``) has ``X.weight_scale_inv``, which multiplies
  despite its name. The product is computed in fp32 and rounded once to the model's dtype.
- compressed-tensors (``float-quantized``, ``naive-quantized``) has ``X.weight_scale`` in the model's dtype, which is also the
  dtype of the product.

The last tiles may be ragged, so the shape of the scales does not determine the size of tiles. The configuration has it
(``weight_block_size``, ``block_structure``); the default is 128 x 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loratool.checkpoint.dtypes import DENSE, DTYPES, Dtype, of_torch
from loratool.checkpoint.header import TensorInfo
from loratool.errors import CheckpointError, quoted
from loratool.weights.coarse.block import Coding
from loratool.weights.coarse.levels import Levels
from loratool.weights.coarse.machine import LoadedCoarse
from loratool.weights.coarse.packing import Bytes
from loratool.weights.coarse.stored import CoarseWeight
from loratool.weights.coarse.tiles import GridTiles, Scaling
from loratool.weights.reading import read_scales
from loratool.weights.storage import Model, Storage

SUFFIX: Final = ".weight"
SCALES: Final = {"_scale_inv": (*DENSE, "F8_E8M0"), "_scale": DENSE}
"""Suffixes that the names of scales add to that of their matrix, with the dtypes that the scales may have."""

ACTIVATIONS: Final = (".activation_scale", ".input_scale")
"""Suffixes that the names of scales of a module's inputs add to that of the module."""

FORMATS: Final = ("float-quantized", "naive-quantized")
USUAL_TILE: Final = (128, 128)


def _e4m3() -> tuple[float, ...]:
    """Return the values of float8_e4m3fn by code: a sign, four exponent bits, three mantissa bits, no infinity."""
    magnitudes = [
        math.ldexp(code & 7 if code < 8 else 8 + (code & 7), max(code >> 3, 1) - 10) if code < 127 else math.nan
        for code in range(128)
    ]
    return (*magnitudes, *(-magnitude for magnitude in magnitudes))


E4M3: Final = Levels(_e4m3())


@dataclass(frozen=True, slots=True)
class Fp8Weight(CoarseWeight):
    """A matrix in FP8. `tile` is the number of rows and of columns of a tile."""

    name: str
    codes: TensorInfo
    scales: TensorInfo
    tile: tuple[int, int]
    dtype: Dtype
    activations: tuple[TensorInfo, ...] = ()

    @property
    def storage(self) -> str:
        return "fp8"

    @property
    def words(self) -> str:
        return "in FP8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.codes,)

    @property
    def siblings(self) -> tuple[TensorInfo, ...]:
        return (self.scales, *self.activations)

    def extents(self, rows: range) -> tuple[tuple[TensorInfo, int, int], ...]:
        start = self.codes.start
        return ((self.codes, start + rows.start * self.columns, start + rows.stop * self.columns),)

    def load(self, device: str) -> LoadedCoarse:
        """Read the scales.

        Raises:
            CheckpointError: a scale is NaN or infinite.
        """
        height, width = self.tile
        tiles = GridTiles(height, width, -(-self.columns // width))
        scaling = Scaling.of(tiles, read_scales(self.scales).to(device))
        return LoadedCoarse(self, Coding(E4M3, Bytes(), self.dtype), scaling, device)


def claim(model: Model, name: str) -> Fp8Weight | None:
    """Return the FP8 matrix called `name`, or None if there is none or its scales are of an unknown kind.

    Raises:
        CheckpointError: it has two tensors of scales, or their shape fits no tiles.
    """
    info, module = model.tensors.get(name), name.removesuffix(SUFFIX)
    if info is None or info.dtype != "F8_E4M3" or len(info.shape) != 2 or module == name:
        return None
    found = {end: model.tensors[name + end] for end in SCALES if name + end in model.tensors}
    if len(found) > 1:
        raise CheckpointError(
            f"{quoted(name)} in {quoted(info.file)} has scales in both {' and '.join(quoted(name + end) for end in found)}; "
            "download the model again"
        )
    if not found or any(scales.dtype not in SCALES[end] for end, scales in found.items()):
        return None
    ((end, scales),) = found.items()
    dtype = DTYPES[scales.dtype] if end == "_scale" else _model_dtype(model)
    activations = tuple(model.tensors[module + end] for end in ACTIVATIONS if module + end in model.tensors)
    return Fp8Weight(name, info, scales, _tile(info, scales, model.config), dtype, activations)


def _tile(info: TensorInfo, scales: TensorInfo, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of a tile, from the shape of the scales."""
    rows, columns = info.shape
    if math.prod(scales.shape) == 1:
        return max(rows, 1), max(columns, 1)
    if scales.shape == (rows, 1):
        return 1, max(columns, 1)
    for height, width in _blocks(config):
        if scales.shape == (-(-rows // height), -(-columns // width)):
            return height, width
    raise CheckpointError(
        f"{quoted(scales.name)} in {quoted(scales.file)} has shape {list(scales.shape)}, which fits no tiles of "
        f"{quoted(info.name)}, {list(info.shape)}; download the model again"
    )


def _blocks(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the tile sizes in the configuration, or the usual one if it has none."""
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    stated = [quantization.get("weight_block_size"), *(each.get("block_structure") for each in _groups(quantization))]
    blocks = [block for block in stated if block is not None] or [USUAL_TILE]
    for block in blocks:
        if (
            isinstance(block, list | tuple)
            and len(block) == 2
            and all(type(side) is int and side > 0 for side in block)
        ):
            yield block[0], block[1]


def _groups(quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return compressed-tensors' description of the weights in each group of modules."""
    groups = quantization.get("config_groups")
    weights = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    return [each for each in weights if isinstance(each, dict)]


def _model_dtype(model: Model) -> Dtype:
    """Return the model's compute dtype: from its configuration, or else that of its first dense tensor."""
    config = model.config
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        stated = str(part.get("dtype") or part.get("torch_dtype")).removeprefix("torch.")
        if stated in {DTYPES[name].torch_name for name in DENSE}:
            return of_torch(stated)
    ends = tuple(SUFFIX + end for end in SCALES) + ACTIVATIONS
    dense = (info.dtype for name, info in model.tensors.items() if info.dtype in DENSE and not name.endswith(ends))
    return DTYPES[next(dense, "BF16")]


def parameter_of(tensor: str) -> str | None:
    """Return the matrix that a tensor of scales belongs to, by its name, or None."""
    for end in SCALES:
        if tensor.endswith(SUFFIX + end):
            return tensor.removesuffix(end)
    return next((tensor.removesuffix(end) + SUFFIX for end in ACTIVATIONS if tensor.endswith(end)), None)


def describes(config: Mapping[str, Any]) -> str | None:
    """Return the title of the storage if a ``quantization_config`` describes a model in FP8, or None."""
    method, groups = config.get("quant_method"), _groups(config)
    if method == "compressed-tensors" and config.get("format") in FORMATS:
        is_it = bool(groups) and all((each.get("type"), each.get("num_bits")) == ("float", 8) for each in groups)
    else:
        is_it = method == "fp8"
    return "FP8" if is_it else None


STORAGE: Final = Storage(
    names=("fp8",), title="FP8 (e4m3)", claim=claim, parameter_of=parameter_of, describes=describes, tags=("fp8",)
)
