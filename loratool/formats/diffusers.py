"""diffusers' LoRA files: PEFT's letters behind the component's name (``unet.``, ``transformer.``, ``text_encoder.``).

A single component's file has no prefix, and has its configuration under ``lora_adapter_metadata``. If no alpha is stated, it is
each module's rank (diffusers 0.42).
"""

from __future__ import annotations

import re
from typing import Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha
from loratool.formats.dotted import describe_dotted, read_dotted

METADATA_KEY: Final = "lora_adapter_metadata"
_PREFIX: Final = re.compile(r"(?:unet|transformer|transformer_2|prior|text_encoder(?:_\d)?)\.")
_LANGUAGE_MODEL: Final = re.compile(
    r"transformer\.(?:h\.|encoder\.layers\.|wte\b|wpe\b|word_embeddings\b|blocks\.\d+\.(?:attn\.(?:Wqkv|out_proj)|ffn\.|norm_attn))"
)
"""Module names of language models that begin with ``transformer`` themselves (GPT-2, Falcon, MPT, ChatGLM)."""

_NAME: Final = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[AB](?:\.default)?\.weight|lora\.(?:down|up)\.weight|lora_(?:down|up)\.weight"
    r"|lora_magnitude_vector(?:\.default)?|lora_B\.bias|alpha|dora_scale|magnitude|lokr_\w+)"
)


def _split(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (
        (match["module"], match["part"].replace("lora.down", "lora_down").replace("lora.up", "lora_up"))
        if match
        else None
    )


def _claims(files: AdapterFiles) -> bool:
    if "peft_type" in files.config:
        return False
    named = [name for name in files.tensors if _split(name) is not None]
    if METADATA_KEY in files.metadata and named:
        return True
    return any(_PREFIX.match(name) and not _LANGUAGE_MODEL.match(name) for name in named)


def _describe(files: AdapterFiles) -> Description:
    return describe_dotted(files, _split)


def _read(files: AdapterFiles, given: Alpha | None) -> Adapter:
    old = next((name for name in files.tensors if ".lora.down." in name or ".lora.up." in name), None)
    if old is not None:
        raise UnsupportedError(
            f"{quoted(files.source)} has tensor names of an older diffusers ({quoted(old)}), which loratool does not read yet; "
            "load it with diffusers and save it again"
        )
    return read_dotted(files, given)


FORMAT: Final = AdapterFormat("diffusers", "diffusers", _claims, _split, _describe, _read)
