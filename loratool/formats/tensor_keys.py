"""The names that PEFT gives to an adapter's tensors: ``base_model.model.<module>.lora_A.weight``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, UnsupportedError, quoted

PREFIX: Final = "base_model.model."
_FACTOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)

_UNSUPPORTED: Final[tuple[tuple[str, str], ...]] = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "LoRA on embeddings"),
    ("lora_diag", "KaSA"),
    (".base_layer.lora_", "MoE parameters (target_parameters)"),
    (".base_layer.", "a copy of the base's own weights (save_embedding_layers)"),
    ("modules_to_save", "modules_to_save"),
    ("token_adapter", "trainable tokens"),
    ("trainable_tokens", "trainable tokens"),
    ("lora_B.bias", "lora_bias"),
    ("vera_lambda", "VeRA"),
    ("ia3_l", "IA3"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
)
"""What a part of a tensor's name tells about the feature that it belongs to."""


def peft_key(module: str, factor: str) -> str:
    """The name that PEFT gives to factor ``A`` or ``B`` of `module`."""
    return f"{PREFIX}{module}.lora_{factor}.weight"


def pair_factors(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """The factors (A, B) of each module, in the order of the modules' names.

    Raises:
        UnsupportedError: a tensor belongs to a feature that loratool does not support; it is named.
        AdapterError: a tensor is no factor, is no matrix, or has no partner.
    """
    factors: dict[str, dict[str, TensorInfo]] = {}
    adapters = set()
    for name, info in sorted(tensors.items()):
        match = _parse_key(name, source)
        if len(info.shape) != 2 or 0 in info.shape:
            raise AdapterError(
                f"{quoted(name)} in {quoted(source)} has shape {list(info.shape)} and must be a matrix; "
                "was it saved from a sharded run without gathering, or for a convolution?"
            )
        pair = factors.setdefault(match["module"], {})
        if match["factor"] in pair:
            raise AdapterError(f"{quoted(source)} holds lora_{match['factor']} of {quoted(match['module'])} twice")
        pair[match["factor"]] = info
        adapters.add(match["adapter"])
    if len(adapters) > 1:
        raise AdapterError(f"{quoted(source)} holds several adapters ({len(adapters)}); save one to a file")
    if not factors:
        raise AdapterError(f"{quoted(source)} holds no LoRA tensors; is it an adapter?")
    return {module: _complete(module, pair, source) for module, pair in sorted(factors.items())}


def refuse_other_features(name: str, source: str) -> None:
    """Raise UnsupportedError if the tensor `name` belongs to a feature that loratool does not support."""
    for part, feature in _UNSUPPORTED:
        if part in name:
            raise UnsupportedError(
                f"{quoted(source)} uses {feature} (tensor {quoted(name)}), which loratool does not support yet"
            )


def _parse_key(name: str, source: str) -> re.Match[str]:
    refuse_other_features(name, source)
    match = _FACTOR.fullmatch(name)
    if match is None:
        raise AdapterError(
            f"{quoted(name)} in {quoted(source)} is no LoRA tensor; their names end in lora_A.weight and lora_B.weight"
        )
    return match


def _complete(module: str, pair: Mapping[str, TensorInfo], source: str) -> tuple[TensorInfo, TensorInfo]:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise AdapterError(f"{quoted(module)} in {quoted(source)} has no lora_{missing}; the file is incomplete")
    a, b = pair["A"], pair["B"]
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"the factors of {quoted(module)} in {quoted(source)} do not fit together: "
            f"lora_A is {list(a.shape)} and lora_B is {list(b.shape)}"
        )
    return a, b
