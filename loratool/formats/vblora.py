"""VB-LoRA (arXiv:2405.15179) in PEFT's names (PEFT 0.21, ``peft.VBLoRAConfig``), with all logits or only the largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import AdapterError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_rank_fields
from loratool.updates import Update
from loratool.updates.vblora import BANK, INDICES, VbLora

NAME: Final = "vblora"
LOGITS: Final = "logits"
WEIGHTS: Final = "weights"
DTYPES: Final = ("U8", "I16", "I32", "I64")
"""Dtypes of indices, by the size of the bank."""

ONLY_TOPK: Final = "save_only_topk_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class VbLoraConfig(ModuleRanks):
    """Targets, r, and of the bank its size, the length of its vectors and how many of them are chosen."""

    num_vectors: int
    vector_length: int
    topk: int
    only_topk: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            AdapterError: a value is missing or impossible.
        """
        read = ConfigReader(config, source)
        sizes: dict[str, Any] = {key: read.positive_int(key) for key in ("num_vectors", "vector_length", "topk")}
        if sizes["topk"] > sizes["num_vectors"]:
            raise AdapterError(
                f"'topk' in {quoted(source)} is {sizes['topk']}, more than the {sizes['num_vectors']} vectors of the bank"
            )
        fields = module_rank_fields(config, source, KINDS[NAME].keys)
        return cls(**fields, **sizes, only_topk=read.flag(ONLY_TOPK))


def vblora_update(module: str, parts: Parts, config: VbLoraConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, has another shape, or is not what the configuration says.
    """
    kept, other = ((INDICES, WEIGHTS), (LOGITS,)) if config.only_topk else ((LOGITS,), (INDICES, WEIGHTS))
    strange = next(
        (parts[f"{name}_{letter}"] for name in other for letter in "AB" if f"{name}_{letter}" in parts), None
    )
    if strange is not None:
        raise UnfitError(f"has {quoted(strange.name)}, and its {ONLY_TOPK} is {str(config.only_topk).lower()}")
    refuse_shape(letter_of(parts, BANK), (config.num_vectors, config.vector_length))
    last = {LOGITS: config.num_vectors, INDICES: config.topk, WEIGHTS: config.topk - 1}
    for name in kept:
        a, b = (letter_of(parts, f"{name}_{letter}", axes=3) for letter in "AB")
        groups = [parts[f"{kept[0]}_{letter}"].shape for letter in "AB"]
        refuse_shape(a, (config.r, groups[0][1], last[name]))
        refuse_shape(b, (groups[1][0], config.r, last[name]))
        if name == INDICES and not {a.dtype, b.dtype} <= set(DTYPES):
            raise UnfitError(f"has indices of the dtype {a.dtype}, which must be {', '.join(DTYPES)}")
    tensors = {f"{name}_{letter}": parts[f"{name}_{letter}"] for name in kept for letter in "AB"}
    return VbLora({**tensors, BANK: parts[BANK]}, topk=config.topk)


_PARTS: Final = {LOGITS: "", INDICES: "_topk_indices", WEIGHTS: "_topk_weights"}

BUILDER: Final = ModuleParts(
    NAME,
    {f"vblora_logits_{letter}{end}": f"{name}_{letter}" for name, end in _PARTS.items() for letter in "AB"},
    VbLoraConfig.parse,
    vblora_update,
    {"vblora_vector_bank": BANK},
).builder()
