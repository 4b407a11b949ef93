"""Refusing, by its name, a way to store weights that loratool does not write."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from loratool.checkpoint.model import Checkpoint
from loratool.errors import UnsupportedError, quoted

OTHER_STORAGE: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".SCB": "bitsandbytes 8-bit (LLM.int8)",
        ".qzeros": "GPTQ or AWQ",
        ".qweight": "GPTQ or AWQ",
        ".weight_scale_inv": "FP8",
        ".weight_packed": "compressed-tensors",
    }
)
"""How the names of tensors end that only these storages have."""


def refuse_other_storage(base: Checkpoint) -> None:
    """Raise UnsupportedError if `base` is quantized in another way than bitsandbytes' 4 bits.

    Its configuration says so (``quantization_config``), or the names of its tensors do.
    """
    config = base.config.get("quantization_config")
    found = None
    if isinstance(config, dict):
        method = config.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes":
            found = str(method)
        elif config.get("load_in_8bit") or config.get("_load_in_8bit"):
            found = OTHER_STORAGE[".SCB"]
    for name in base.tensors:
        found = found or next((what for end, what in OTHER_STORAGE.items() if name.endswith(end)), None)
    if found:
        raise UnsupportedError(
            f"{quoted(base.path)} stores its weights as {quoted(found)}; loratool merges into fp32, fp16, bf16 and "
            "bitsandbytes NF4 and FP4 weights: use the model that it was quantized from"
        )
