"""TinyLoRA (arXiv:2602.04118) in PEFT's names (PEFT 0.21, ``peft.TinyLoraConfig``), with saved projections and one vector."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from loratool.errors import UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_rank_fields
from loratool.updates import Update
from loratool.updates.tinylora import TinyLora

NAME: Final = "tinylora"
SAVED: Final = "save_projection"
_VECTOR: Final = re.compile(r"(?:base_model\.)?tinylora_v\.(?:.+\.)?\d+")


def _parse(config: Mapping[str, Any], source: str) -> ModuleRanks:
    if SAVED in config and not ConfigReader(config, source).flag(SAVED):
        raise UnsupportedError(
            f"{quoted(source)} is a TinyLoRA without its projections ({SAVED} is false), which PEFT draws for the modules in the "
            f"order of the model's code, which no file tells; load it in PEFT and save it again with {SAVED}=True"
        )
    return ModuleRanks(**module_rank_fields(config, source, KINDS[NAME].keys))


def tinylora_update(module: str, parts: Parts, config: ModuleRanks) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or does not fit the others or the configuration.
    """
    a, b = (letter_of(parts, letter, axes=2) for letter in "AB")
    p, v = letter_of(parts, "P", axes=3), letter_of(parts, "v", axes=1)
    rank = a.shape[0]
    refuse_shape(b, (b.shape[0], rank))
    refuse_shape(p, (v.shape[0], rank, rank))
    if rank > config.r:  # a smaller matrix has fewer components
        raise UnfitError(f"has rank {rank} and the configuration says {config.r}")
    return TinyLora({"A": a, "B": b, "P": p, "v": v})


_PARTS: Final = ModuleParts(
    NAME,
    {f"tinylora_{letter}": letter for letter in "ABP"},
    _parse,
    tinylora_update,
    {"tinylora_v.0": "v"},
)


def _read(files: AdapterFiles, given: Alpha | None) -> Adapter:
    vectors = sorted(name for name in files.tensors if _VECTOR.fullmatch(name))
    if len(vectors) > 1:
        raise UnsupportedError(
            f"{quoted(files.source)} is a TinyLoRA with {len(vectors)} vectors, which belong to the modules in the order of the "
            "model's code, which no file tells; merge it with PEFT"
        )
    return _PARTS.read(files, given)


BUILDER: Final = replace(_PARTS.builder(), read=_read)
