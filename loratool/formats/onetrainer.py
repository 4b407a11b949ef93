"""OneTrainer's own layout: kohya's tensors under diffusers' module names, flattened (``lora_transformer_...``).

Older releases write it, and diffusers calls it a mixture. Letters, alpha and arithmetic are kohya's; only module names differ.
"""

from __future__ import annotations

from typing import Final

from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat
from loratool.formats.kohya import describe_kohya, read_kohya, split_kohya

PREFIXES: Final = ("lora_transformer_", "lora_prior_unet_")


def _claims(files: AdapterFiles) -> bool:
    return any(name.startswith(PREFIXES) and split_kohya(name) is not None for name in files.tensors)


FORMAT: Final = AdapterFormat("onetrainer", "OneTrainer", _claims, split_kohya, describe_kohya, read_kohya)
