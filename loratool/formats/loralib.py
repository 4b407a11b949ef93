"""loralib's state dicts (the LoRA authors' library): ``X.lora_A`` and ``X.lora_B`` without ``.weight``, and no alpha."""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import parts_of, ranks_of
from loratool.formats.kinds import LORA
from loratool.formats.tensor_keys import PREFIX

_NAME: Final = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])")


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match and not name.startswith(PREFIX) else None


def _claims(files: AdapterFiles) -> bool:
    if files.config or any(name.endswith(".lora_E") for name in files.tensors):
        return False
    return any(_split(name) is not None for name in files.tensors)


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    return Description(LORA, ranks_of(modules, LORA), None, tuple(modules), why_not=WHY_NOT)


WHY_NOT: Final = "loratool does not read loralib's layout yet; rename its tensors to lora_A.weight and lora_B.weight"
FORMAT: Final = AdapterFormat("loralib", "loralib", _claims, _split, _describe, why_not=WHY_NOT)
