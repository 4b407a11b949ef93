"""GGUF adapters, as llama.cpp's ``convert_lora_to_gguf.py`` writes them: ``<base tensor>.weight.lora_a`` and ``.lora_b``.

The key-value pairs give the type (``general.type`` adapter, ``adapter.type`` lora), the architecture and alpha. An alpha of 0
means a scaling of 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from loratool.errors import AdapterError, quoted
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import parts_of, ranks_of
from loratool.formats.kinds import LORA

_NAME: Final = re.compile(r"(?P<module>.+?)(?:\.weight)?\.(?P<part>lora_[ab])")
_HUB_URL: Final = re.compile(r"https://huggingface\.co/(?P<id>[\w.-]+/[\w.-]+)/?")


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def _claims(files: AdapterFiles) -> bool:
    if files.container != "gguf":
        return False
    if files.metadata.get("general.type") != "adapter":
        raise AdapterError(
            f"{quoted(files.source)} is a GGUF model, not an adapter; loratool accepts GGUF files of adapters only"
        )
    return True


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    ranks = ranks_of(modules, LORA, {"lora_b": 1})
    alpha = files.metadata.get("adapter.lora.alpha")
    alpha = float(alpha) if isinstance(alpha, int | float) else None
    architecture = files.metadata.get("general.architecture")
    return Description(
        kind=LORA,
        ranks=ranks,
        alpha=alpha or None,
        modules=tuple(modules),
        base_model=_base_model(files.metadata),
        family=architecture if isinstance(architecture, str) else None,
        scaling=None if alpha else 1.0,
        why_not=WHY_NOT,
    )


def _base_model(metadata: Mapping[str, Any]) -> str | None:
    url = metadata.get("general.base_model.0.repo_url")
    match = _HUB_URL.fullmatch(url) if isinstance(url, str) else None
    name = match["id"] if match else metadata.get("general.base_model.0.name")
    return name if isinstance(name, str) and name else None


WHY_NOT: Final = "loratool does not read GGUF adapters yet; load it with llama.cpp (--lora), or use its PEFT folder"
FORMAT: Final = AdapterFormat("gguf", "GGUF", _claims, _split, _describe, why_not=WHY_NOT)
