"""LoRA with dotted module names, as written by ComfyUI and many trainers of image and video models.

The names are ``diffusion_model.<module>.lora_A.weight`` or ``.lora_down.weight``, and optionally ``<module>.alpha``; without it
the scaling is 1. The modules are the original model's, so they land on a checkpoint with the original names.
"""

from __future__ import annotations

import re
from typing import Final

from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha
from loratool.formats.describe import Split
from loratool.formats.kohya import describe_kohya
from loratool.formats.lora import read_pairs

COMFYUI_PREFIXES: Final = ("diffusion_model.", "text_encoders.")
_NAME: Final = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:down|up|mid|A|B)(?:\.default)?\.weight|lora_B\.bias|alpha|dora_scale|magnitude"
    r"|(?:hada|lokr|oft)_\w+|diff|diff_b|set_weight|reshape_weight|[wb]_norm)"
)
_KOHYA_LETTERS: Final = (".lora_down.weight", ".lora_up.weight")


def split_dotted(name: str) -> tuple[str, str] | None:
    match = _NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


def describe_dotted(files: AdapterFiles, split: Split | None = None) -> Description:
    """Return what the tensors and a trainer's metadata describe."""
    return describe_kohya(files, split or split_dotted)


def read_dotted(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read a LoRA of linear layers; raises like `peft.read`."""
    return read_pairs(files, given, absent_is_rank=True)


def _claims_comfyui(files: AdapterFiles) -> bool:
    return any(name.startswith(COMFYUI_PREFIXES) and split_dotted(name) is not None for name in files.tensors)


def _claims_dotted(files: AdapterFiles) -> bool:
    return any(name.endswith(_KOHYA_LETTERS) and split_dotted(name) is not None for name in files.tensors)


COMFYUI: Final = AdapterFormat("comfyui", "ComfyUI", _claims_comfyui, split_dotted, describe_dotted, read_dotted)
DOTTED: Final = AdapterFormat("dotted", "dotted kohya", _claims_dotted, split_dotted, describe_dotted, read_dotted)
