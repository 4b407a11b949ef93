"""Planning to quantize a dense model to NF4, or to store a 4-bit model densely, with a merge on the way or without.

An NF4 model is what transformers saves of one that it loaded with a ``BitsAndBytesConfig``: bitsandbytes' tensors for
every linear module, and a ``quantization_config`` in ``config.json`` by which it is loaded as it is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, UnsupportedError, quoted
from loratool.merging.conversion import (
    TORCH_NAMES,
    Conversion,
    ConversionPlan,
    Storage,
    merged_only,
    to_dense,
    to_nf4,
)
from loratool.merging.linear import is_conv1d, linear_weights, skipped_modules
from loratool.merging.plan import MergePlan, Target
from loratool.weights import dense, four_bit
from loratool.weights.dense import DenseWeight
from loratool.weights.four_bit import FourBitWeight
from loratool.weights.storages import quantized_names, refuse_other_storage


def plan_conversion(base: Checkpoint, storage: Storage, merge: MergePlan | None = None) -> ConversionPlan:
    """Find the matrices of `base` that are stored otherwise in the end, and what they become; `merge` is done on the way.

    Raises:
        CheckpointError: `base` has no configuration that could say that it is quantized, or is damaged.
        UnsupportedError: it is quantized already (not quantized), or which matrices are to be quantized cannot be told.
    """
    refuse_other_storage(base, base.path)
    targets = {} if merge is None else {target.name: target for target in merge.targets}
    if storage.way == "dequantize":
        found, config = _dequantization(base, targets)
    else:
        found, config = _quantization(base, storage, targets)
    named = {conversion.name for conversion in found}
    alone = [name for name in targets if name not in named and base.tensors[name].nbytes]
    conversions = [
        *found,
        *(merged_only(_dense(name, base), targets[name]) for name in alone),
    ]
    return ConversionPlan(base, storage, tuple(sorted(conversions, key=lambda each: each.name)), config, merge)


def _quantization(base: Checkpoint, storage: Storage,
                  targets: Mapping[str, Target]) -> tuple[list[Conversion], Mapping[str, Any]]:  # fmt: skip
    """The matrices that become NF4, and the new configuration."""
    if not base.config:
        raise CheckpointError(
            f"{quoted(base.path)} has no config.json, which must say that a model is quantized; give a model's whole folder"
        )
    if base.config.get("quantization_config") or quantized_names(base):
        raise UnsupportedError(
            f"{quoted(base.path)} is quantized already; merge into it as it is, or give the dense model that it was made from"
        )
    conversions = [
        to_nf4(
            _dense(name, base),
            storage.nf4,
            turned=is_conv1d(name, base.config),
            updates=targets.get(name),
            into_image=storage.way == "base_as",
        )
        for name in linear_weights(base.tensors, base.config)
    ]
    if not conversions:
        raise UnsupportedError(f"{quoted(base.path)} has no linear modules with a weight; there is nothing to quantize")
    dtypes = Counter(TORCH_NAMES[each.dense.tensor.dtype] for each in conversions)
    compute_dtype = storage.compute_dtype or dtypes.most_common(1)[0][0]
    return conversions, {**base.config, "quantization_config": _quantization_config(storage, compute_dtype, base)}


def _dequantization(base: Checkpoint,
                    targets: Mapping[str, Target]) -> tuple[list[Conversion], Mapping[str, Any] | None]:  # fmt: skip
    """The matrices that become dense, and the new configuration."""
    conversions = [
        to_dense(_four_bit(name, base), turned=is_conv1d(name, base.config), updates=targets.get(name))
        for name in quantized_names(base)
    ]
    if not conversions:
        raise UnsupportedError(f"{quoted(base.path)} has no 4-bit matrices; it is merged into without dequantizing")
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    return conversions, config if base.config else None


def _dense(name: str, base: Checkpoint) -> DenseWeight:
    weight = dense.claim(base, name)
    if weight is None:
        raise UnsupportedError(
            f"{quoted(name)} in {quoted(base.tensors[name].file)} is stored as {base.tensors[name].dtype}; loratool "
            "quantizes fp32, fp16 and bf16 matrices"
        )
    return weight


def _four_bit(name: str, base: Checkpoint) -> FourBitWeight:
    weight = four_bit.claim(base, name)
    if weight is None:
        raise CheckpointError(
            f"{quoted(base.path)} says how {quoted(name)} is stored in 4 bits, but one of its tensors is missing; "
            "download the model again"
        )
    return weight


def _quantization_config(storage: Storage, compute_dtype: str, base: Checkpoint) -> dict[str, Any]:
    """What transformers 5 writes for a ``BitsAndBytesConfig``."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": storage.nf4.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped_modules(base.tensors.keys()),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
