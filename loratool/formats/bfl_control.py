"""Black Forest Labs' control LoRAs for Flux (depth, canny): factors, biases, norms and a wider ``img_in``."""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import parts_of, ranks_of
from loratool.formats.kinds import LORA

_NAME: Final = re.compile(r"(?P<module>.+?)\.(?P<part>lora_[AB]\.(?:weight|bias)|scale)")
_INPUT: Final = "img_in.lora_A.weight"
_NORMS: Final = (".norm.key_norm.scale", ".norm.query_norm.scale")


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def _claims(files: AdapterFiles) -> bool:
    return _INPUT in files.tensors and any(name.endswith(_NORMS) for name in files.tensors)


def _describe(files: AdapterFiles) -> Description:
    modules = {name: parts for name, parts in parts_of(files.tensors, _split).items() if "scale" not in parts}
    return Description(LORA, ranks_of(modules, LORA), None, tuple(modules), family="flux", why_not=WHY_NOT)


WHY_NOT: Final = (
    "it replaces norms and widens the base's input, which loratool does not compute yet; load it with diffusers"
)
FORMAT: Final = AdapterFormat("bfl-control", "BFL control", _claims, _split, _describe, why_not=WHY_NOT)
