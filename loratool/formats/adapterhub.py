"""AdapterHub's folders (adapters 1.3): ``adapter.safetensors`` and an ``adapter_config.json`` with ``config.architecture``.

Tensors carry the adapter's name: ``...query.loras.NAME.lora_A``, ``...adapters.NAME.adapter_down.0.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import parts_of, ranks_of
from loratool.formats.kinds import KINDS, LORA, kind_named

_NAME: Final = re.compile(
    r"(?P<module>.+?)\.(?:loras|adapters|prefix_tunings|prompt_tunings|refts|adapter_fusion_layer|shared_parameters)"
    r"\.(?P<adapter>[^.]+)\.(?P<part>.+)"
)
_SIGNS: Final = (".loras.", ".adapters.")
_SCALED: Final = (LORA, "dora")
"""Kinds in which ``r`` and ``alpha`` are a rank and its alpha; other kinds use these keys differently."""

_KINDS: Final[Mapping[str, str]] = {"prefix_tuning": "prefix_tuning", "prompt_tuning": "prompt_tuning"}


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def _claims(files: AdapterFiles) -> bool:
    if "peft_type" in files.config:
        return False
    if isinstance(files.config.get("config"), dict) and "model_type" in files.config:
        return True
    parts = [where[1] for name in files.tensors if any(sign in name for sign in _SIGNS) and (where := _split(name))]
    return any(part.startswith(("lora_", "adapter_down", "adapter_up")) for part in parts)


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    settings = files.config.get("config")
    settings = settings if isinstance(settings, dict) else {}
    kind = _kind(settings, modules)
    rank, alpha, model = settings.get("r"), settings.get("alpha"), files.config.get("model_name")
    ranks = ranks_of(modules, kind)
    if type(rank) is int and 0 < rank < 1 << 31 and kind in _SCALED:
        ranks = {module: ranks.get(module, rank) for module in modules}
    return Description(
        kind=kind,
        ranks=ranks,
        alpha=float(alpha)
        if isinstance(alpha, int | float) and not isinstance(alpha, bool) and kind in _SCALED
        else None,
        modules=tuple(modules),
        base_model=model if isinstance(model, str) and model else None,
        family=files.config["model_type"] if isinstance(files.config.get("model_type"), str) else None,
        why_not=kind_named(kind).why_not or WHY_NOT,
    )


def _kind(settings: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]]) -> str:
    architecture = settings.get("architecture")
    if isinstance(architecture, str) and architecture in _KINDS:
        return _KINDS[architecture]
    if architecture == "union":
        return "mixed"
    parts = {part for parts in modules.values() for part in parts}
    if architecture == "lora" or any(part.startswith("lora_") for part in parts):
        if settings.get("composition_mode") == "scale":
            return "ia3"
        if settings.get("vera_d") is not None:
            return "vera"
        return "dora" if settings.get("use_dora") or any(part.startswith("m.") for part in parts) else LORA
    return architecture if isinstance(architecture, str) and architecture in KINDS else "bottleneck"


WHY_NOT: Final = "loratool does not read AdapterHub's layout yet; merge it with the adapters library (merge_adapter)"
FORMAT: Final = AdapterFormat("adapterhub", "AdapterHub", _claims, _split, _describe, why_not=WHY_NOT)
