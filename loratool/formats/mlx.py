"""mlx-lm's adapters: ``adapters.safetensors`` with ``lora_a`` (in, r) and ``lora_b`` (r, out), and ``adapter_config.json``.

The configuration is not PEFT's: ``lora_parameters.scale`` multiplies the product directly, and there is no alpha. ``X.m`` is a
DoRA's magnitude. With the type ``full`` the file contains whole weights. (mlx-lm 0.32.)
"""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import kind_of, parts_of, ranks_of
from loratool.formats.kinds import LORA, kind_named

_FACTOR: Final = re.compile(r"(?P<module>[^\d.][^.]*(?:\..+)?)\.(?P<part>lora_[ab]|m)")
_WHOLE: Final = re.compile(r"(?P<module>[^\d.][^.]*(?:\..+)?)\.(?P<part>weight|bias|scales|biases)")


def _split(name: str) -> tuple[str, str] | None:
    match = _FACTOR.fullmatch(name)
    if match:
        return match["module"], "magnitude" if match["part"] == "m" else match["part"]
    match = _WHOLE.fullmatch(name)
    return (match["module"], f"set_weight.{match['part']}") if match else None


def _claims(files: AdapterFiles) -> bool:
    if "peft_type" in files.config:
        return False
    if "fine_tune_type" in files.config or "lora_parameters" in files.config:
        return True
    parts = {match["part"] for name in files.tensors if (match := _FACTOR.fullmatch(name))}
    return {"lora_a", "lora_b"} <= parts


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    kind = kind_of(modules) or LORA
    parameters = files.config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    model = files.config.get("model")
    return Description(
        kind=kind,
        ranks=ranks_of(modules, kind, {"lora_a": 1}),
        alpha=None,
        modules=tuple(modules),
        base_model=model if isinstance(model, str) and model else None,
        scaling=float(scale)
        if kind != "full" and isinstance(scale, int | float) and not isinstance(scale, bool)
        else None,
        why_not=kind_named(kind).why_not or WHY_NOT,
    )


WHY_NOT: Final = "loratool does not read MLX's layout yet; fuse it with mlx-lm (mlx_lm.fuse)"
FORMAT: Final = AdapterFormat("mlx", "MLX", _claims, _split, _describe, why_not=WHY_NOT)
