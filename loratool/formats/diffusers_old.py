"""The LoRA files of diffusers' first releases: attention processors, ``...attn1.processor.to_q_lora.down.weight``.

``to_out_lora`` is ``to_out.0``, text encoders have ``.lora_linear_layer.down.weight``, and the scaling is always 1.
"""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import parts_of, ranks_of
from loratool.formats.kinds import LORA

_PROCESSOR: Final = re.compile(
    r"(?P<module>.+)\.processor\.(?P<target>to_(?:q|k|v|out))_lora\.(?P<way>down|up)\.weight"
)
_TEXT: Final = re.compile(r"(?P<module>.+)\.lora_linear_layer\.(?P<way>down|up)\.weight")


def _split(name: str) -> tuple[str, str] | None:
    if match := _PROCESSOR.fullmatch(name):
        target = match["target"].replace("to_out", "to_out.0")
        return f"{match['module']}.{target}", f"lora_{match['way']}.weight"
    match = _TEXT.fullmatch(name)
    return (match["module"], f"lora_{match['way']}.weight") if match else None


def _claims(files: AdapterFiles) -> bool:
    return any(_split(name) is not None for name in files.tensors)


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    return Description(LORA, ranks_of(modules, LORA), None, tuple(modules), why_not=WHY_NOT)


WHY_NOT: Final = (
    "loratool does not read files of early diffusers releases yet; load it with diffusers and save it again"
)
FORMAT: Final = AdapterFormat("diffusers-old", "old diffusers", _claims, _split, _describe, why_not=WHY_NOT)
