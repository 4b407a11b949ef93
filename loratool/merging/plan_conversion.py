"""Planning to quantize a dense model, or to store a quantized model densely, with a merge on the way or without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, UnsupportedError, quoted
from loratool.formats.names import SUFFIX
from loratool.merging.conversion import (
    Conversion,
    ConversionPlan,
    StorageChange,
    merged_only,
    to_dense,
    to_quantized,
)
from loratool.merging.linear import is_conv1d, linear_weights, skipped_modules
from loratool.merging.plan import MergePlan, Target
from loratool.weights import dense
from loratool.weights.dense import DenseWeight
from loratool.weights.making import Making
from loratool.weights.storages import is_dense, quantized_names, refuse_other_storage, stored_weight
from loratool.weights.stored import StoredWeight


def plan_conversion(base: Checkpoint, change: StorageChange, merge: MergePlan | None = None) -> ConversionPlan:
    """Find the matrices of `base` that are stored differently in the end, and what they become; `merge` is done on the way.

    Raises:
        CheckpointError: `base` has no configuration that could say that it is quantized, or is damaged.
        UnsupportedError: it is quantized already (not quantized), or which matrices are to be quantized cannot be told.
    """
    refuse_other_storage(base, base.path)
    targets = {} if merge is None else {target.name: target for target in merge.targets}
    if change.making is None:
        found, config = _dequantization(base, targets)
    else:
        found, config = _quantization(base, change, change.making, targets)
    named = {conversion.name for conversion in found}
    alone = [name for name in targets if name not in named and base.tensors[name].nbytes]
    conversions = [
        *found,
        *(merged_only(_dense(name, base), targets[name]) for name in alone),
    ]
    return ConversionPlan(base, change, tuple(sorted(conversions, key=lambda each: each.name)), config, merge)


def _quantization(base: Checkpoint, change: StorageChange, making: Making,
                  targets: Mapping[str, Target]) -> tuple[list[Conversion], Mapping[str, Any]]:  # fmt: skip
    """The matrices that are quantized, and the new configuration."""
    if not base.config:
        raise CheckpointError(
            f"{quoted(base.path)} has no config.json, which must say that a model is quantized; give a model's whole folder"
        )
    if base.config.get("quantization_config") or quantized_names(base):
        raise UnsupportedError(
            f"{quoted(base.path)} is quantized already; merge into it as it is, or give the dense model that it was made from"
        )
    conversions = [
        to_quantized(
            _dense(name, base),
            making,
            turned=is_conv1d(name, base.config),
            updates=targets.get(name),
            into_image=change.way == "base_as",
        )
        for name in linear_weights(base.tensors, base.config)
    ]
    if not conversions:
        raise UnsupportedError(f"{quoted(base.path)} has no linear modules with a weight; there is nothing to quantize")
    dtypes = Counter(each.dense.dtype.torch_name for each in conversions)
    compute_dtype = change.compute_dtype or dtypes.most_common(1)[0][0]
    quantization = making.quantization_config(compute_dtype, skipped_modules(base.tensors.keys()))
    return conversions, {**base.config, "quantization_config": quantization}


def _dequantization(base: Checkpoint,
                    targets: Mapping[str, Target]) -> tuple[list[Conversion], Mapping[str, Any] | None]:  # fmt: skip
    """The matrices that become dense, and the new configuration."""
    conversions = [
        to_dense(_quantized(name, base), turned=is_conv1d(name, base.config), updates=targets.get(name))
        for name in quantized_names(base)
    ]
    if not conversions:
        raise UnsupportedError(f"{quoted(base.path)} has no quantized matrices; it is merged into without dequantizing")
    _refuse_unknown(base)
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    return conversions, config if base.config else None


def _refuse_unknown(base: Checkpoint) -> None:
    """Raise UnsupportedError for a matrix that is not dense and cannot be decoded: the new model would not say what it is."""
    for name, info in base.tensors.items():
        if name.endswith(SUFFIX) and len(info.shape) == 2 and stored_weight(base, name) is None:
            raise UnsupportedError(
                f"{quoted(name)} in {quoted(info.file)} is stored as {info.dtype}, which loratool cannot dequantize; merge "
                "without --dequantize"
            )


def _dense(name: str, base: Checkpoint) -> DenseWeight:
    weight = dense.claim(base, name)
    if weight is None:
        raise UnsupportedError(
            f"{quoted(name)} in {quoted(base.tensors[name].file)} is stored as {base.tensors[name].dtype}; loratool "
            "quantizes fp32, fp16 and bf16 matrices"
        )
    return weight


def _quantized(name: str, base: Checkpoint) -> StoredWeight:
    weight = stored_weight(base, name)
    if weight is None or is_dense(weight):
        raise CheckpointError(
            f"{quoted(base.path)} says how {quoted(name)} is quantized, but one of its tensors is missing; "
            "download the model again"
        )
    return weight
