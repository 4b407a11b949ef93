"""DoRA (Liu et al. 2024, arXiv:2402.09353) in PEFT's names: a LoRA with a ``lora_magnitude_vector`` for each module.

PEFT 0.21 saves the magnitudes of a linear layer as (out,), of an embedding as (features,) and of a convolution as (1, out, 1...),
without ``.weight`` at the end of the name. A saved model state has the suffix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter, of_weights
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha
from loratool.formats.builder import Builder, Factors
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.lora import lora_settings, read_lora
from loratool.formats.lora_config import LoraConfig
from loratool.formats.lora_product import product_of
from loratool.formats.tensor_keys import PREFIX, peft_key
from loratool.updates import Update
from loratool.updates.dora import Dora

NAME: Final = "dora"
_MAGNITUDE: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)


def read_dora(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read a DoRA of linear layers, convolutions and embeddings.

    Raises:
        UnsupportedError: it uses another feature that loratool does not compute.
        AdapterError: it is damaged or incomplete, or does not state its alpha.
    """
    setting = str(KINDS[NAME].setting)
    ConfigReader(files.config, files.config_source).flag(setting)
    magnitudes, rest = _split(files.tensors, files.source)
    adapter = read_lora(replace(files, tensors=rest), given)
    factors = {module: {**update.tensors} for module, update in adapter.ranked.items()}
    for module in sorted(factors.keys() ^ magnitudes.keys()):
        what = "no lora_magnitude_vector" if module in factors else "a lora_magnitude_vector and no factors"
        raise AdapterError(f"{quoted(module)} in {quoted(files.source)}, a DoRA, has {what}; the file is incomplete")
    for module, info in magnitudes.items():
        _refuse_unfit(module, info, adapter.ranked[module].shape, files.source)
        factors[module]["m"] = info
    config = {**adapter.config, setting: True}
    updates = dora_updates(factors, lora_settings(adapter))
    return replace(adapter, kind=NAME, changes=of_weights(updates), config=config)


def dora_updates(factors: Factors, lora: LoraConfig) -> dict[str, Update]:
    """Return the update of each module."""
    return {module: Dora(product_of(each, lora.scaling_of(module)), each["m"]) for module, each in factors.items()}


def dora_key(module: str, letter: str) -> str:
    """Return PEFT's name of factor ``A`` or ``B`` of `module`, or of its magnitudes ``m``."""
    return f"{PREFIX}{module}.lora_magnitude_vector" if letter == "m" else peft_key(module, letter)


def _split(tensors: Mapping[str, TensorInfo], source: str) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Return the magnitudes by module, and all other tensors by name."""
    magnitudes: dict[str, TensorInfo] = {}
    rest = {}
    for name, info in sorted(tensors.items()):
        match = _MAGNITUDE.fullmatch(name)
        if match is None:
            rest[name] = info
        elif match["module"] in magnitudes:
            raise AdapterError(f"{quoted(source)} holds the magnitudes of {quoted(match['module'])} twice")
        else:
            magnitudes[match["module"]] = info
    return magnitudes, rest


def _refuse_unfit(module: str, info: TensorInfo, shape: tuple[int, ...], source: str) -> None:
    """Raise AdapterError if the magnitudes do not fit a W of this shape."""
    outputs, *others = shape
    of_convolution = (1, outputs, *(1 for _ in others[1:]))
    if info.shape not in ((outputs,), (outputs, 1), *((of_convolution,) if others[1:] else ())):
        raise AdapterError(
            f"the magnitudes of {quoted(module)} in {quoted(source)} are {list(info.shape)} and its factors have {outputs} "
            "outputs; was it saved from a sharded run without gathering?"
        )


BUILDER: Final = Builder(read_dora, LoraConfig.parse, dora_updates, dora_key)
