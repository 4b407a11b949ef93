"""LyCORIS' files (LyCORIS 4.1): LoHa, LoKr, GLoRA, IA3, OFT, DoRA and full differences with flattened module names.

Plain LoRA layers are written like kohya's, so a file with only those is in kohya's format.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.kohya import describe_kohya

_NAME: Final = re.compile(
    r"(?P<module>[^.]+)\.(?P<part>lora_(?:down|up|mid)\.weight|lora_t[12]|alpha|weight|scalar|bias|rescale"
    r"|(?:hada|lokr|oft)_\w+|dora_scale|diff|diff_b|[wb]_norm|on_input|[ab][12]\.weight|bm\.weight"
    r"|(?:q|p|lambda)_layer(?:\.\w+)?)"
)
_SIGNS: Final = (
    "hada_", "lokr_", "oft_", "diff", "w_norm", "b_norm", "on_input", "dora_scale", "lora_mid", "a1.", "a2.", "b1.", "b2.",
    "q_layer", "p_layer", "lambda_layer",
)  # fmt: skip
"""Parts that kohya's own networks do not have."""

PREFIX: Final = "lycoris_"
BLOCKS: Final = ".oft_blocks"
BLOCK_DIMENSIONS: Final = 3
"""Number of axes of OFT's blocks (blocks, n, n); BOFT has one more, for its factors."""


def split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def _claims(files: AdapterFiles) -> bool:
    found = [where for name in files.tensors if (where := split(name)) is not None]
    return any(part.startswith(_SIGNS) or module.startswith(PREFIX) for module, part in found)


def _describe(files: AdapterFiles) -> Description:
    found = describe_kohya(files, split)
    butterfly = found.kind == "oft" and any(
        name.endswith(BLOCKS) and len(info.shape) > BLOCK_DIMENSIONS for name, info in files.tensors.items()
    )
    return replace(found, kind="boft" if butterfly else found.kind, why_not=found.why_not or WHY_NOT)


WHY_NOT: Final = (
    "loratool does not read LyCORIS' layout yet; merge it with the program that trained it, or save it as a PEFT folder"
)
FORMAT: Final = AdapterFormat("lycoris", "LyCORIS", _claims, split, _describe, why_not=WHY_NOT)
