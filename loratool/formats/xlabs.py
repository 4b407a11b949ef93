"""XLabs' LoRA for Flux: processors of double and single blocks, with q, k and v in one matrix; no alpha, a scaling of 1."""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import parts_of, ranks_of
from loratool.formats.kinds import LORA

_NAME: Final = re.compile(
    r"(?P<module>(?:diffusion_model\.)?(?:double|single)_blocks\.\d+)\.processor\.(?P<target>(?:qkv|proj)_lora[12]?)\.(?P<way>down|up)\.weight"
)


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (
        (f"{match['module']}.{match['target'].replace('_lora', '')}", f"lora_{match['way']}.weight") if match else None
    )


def _claims(files: AdapterFiles) -> bool:
    return any(_split(name) is not None for name in files.tensors)


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    return Description(LORA, ranks_of(modules, LORA), None, tuple(modules), family="flux", why_not=WHY_NOT)


WHY_NOT: Final = "loratool does not read XLabs' layout yet; load it with diffusers and save it again"
FORMAT: Final = AdapterFormat("xlabs", "XLabs", _claims, _split, _describe, why_not=WHY_NOT)
