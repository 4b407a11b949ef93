"""torchtune's LoRA: Meta's module names, ``layers.N.attn.q_proj.lora_a.weight``, and rows of q and k in Meta's rotary order."""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.describe import kind_of, parts_of, ranks_of
from loratool.formats.kinds import LORA

_NAME: Final = re.compile(
    r"(?P<module>(?:layers\.\d+\.(?:attn|mlp)\.\w+|output|tok_embeddings))\.(?P<part>lora_[ab]\.weight|magnitude)"
)


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def _claims(files: AdapterFiles) -> bool:
    return "peft_type" not in files.config and any(_split(name) is not None for name in files.tensors)


def _describe(files: AdapterFiles) -> Description:
    modules = parts_of(files.tensors, _split)
    kind = kind_of(modules) or LORA
    alpha = files.config.get("lora_alpha")
    return Description(
        kind,
        ranks_of(modules, kind),
        float(alpha) if isinstance(alpha, int | float) else None,
        tuple(modules),
        why_not=WHY_NOT,
    )


WHY_NOT: Final = (
    "loratool does not read torchtune's layout yet; torchtune's Hugging Face checkpointer saves it as a PEFT folder too"
)
FORMAT: Final = AdapterFormat("torchtune", "torchtune", _claims, _split, _describe, why_not=WHY_NOT)
