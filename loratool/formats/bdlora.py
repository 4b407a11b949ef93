"""BD-LoRA in PEFT's names (PEFT 0.21, ``peft.tuners.lora.BdLoraConfig``): a LoRA with ``use_bdlora``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from loratool.errors import AdapterError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.lora_config import LoraConfig
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of
from loratool.updates import Update
from loratool.updates.bdlora import BlockDiagonal

NAME: Final = "bdlora"
SETTING: Final = str(KINDS[NAME].setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig(LoraConfig):
    """The settings of a LoRA, and which factors are block-diagonal.

    Attributes:
        blocks: the number of blocks.
        of_a, of_b: texts in the names of modules whose A, or B, is.
        strict: whether every module must have such a factor.
    """

    blocks: int
    of_a: tuple[str, ...]
    of_b: tuple[str, ...]
    strict: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            UnsupportedError: it asks for a feature that loratool does not compute.
            AdapterError: a value is missing or impossible.
        """
        plain = LoraConfig.parse(config, source)
        inside = config.get(SETTING)
        if not isinstance(inside, Mapping):
            raise AdapterError(f"{quoted(SETTING)} in {quoted(source)} is {quoted(inside, 40)} and must be an object")
        read = ConfigReader({"match_strict": True, **inside}, source)
        return cls(
            **{field.name: getattr(plain, field.name) for field in fields(plain)},
            blocks=read.positive_int("nblocks"),
            of_a=read.strings("target_modules_bd_a"),
            of_b=read.strings("target_modules_bd_b"),
            strict=read.flag("match_strict"),
        )

    def blocks_of(self, module: str) -> tuple[int, int]:
        """Return the numbers of blocks of a module's A and B.

        Raises:
            UnfitError: both are block-diagonal, or neither, although the settings are strict.
        """
        name = module.rpartition(".")[2]
        of_a, of_b = (any(text in name for text in texts) for texts in (self.of_a, self.of_b))
        if of_a and of_b:
            raise UnfitError(f"is in both target_modules_bd_a and target_modules_bd_b of {quoted(self.source)}")
        if self.strict and not (of_a or of_b):
            raise UnfitError(f"is in neither target_modules_bd_a nor target_modules_bd_b of {quoted(self.source)}")
        return self.blocks if of_a else 1, self.blocks if of_b else 1


def _update(module: str, parts: Parts, config: BlockConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a factor is missing, or does not fit the other or the configuration.
    """
    a, b = letter_of(parts, "A", axes=2), letter_of(parts, "B", axes=2)
    blocks_of_a, blocks_of_b = config.blocks_of(module)
    rank = config.rank_of(module)
    shapes = f"lora_A of shape {list(a.shape)} and lora_B of shape {list(b.shape)}"
    if a.shape[0] != rank or b.shape[1] * blocks_of_b != rank:
        raise UnfitError(f"has {shapes}, which do not make rank {rank} with {config.blocks} blocks")
    if a.shape[0] % blocks_of_a or b.shape[0] % blocks_of_b:
        raise UnfitError(f"has {shapes}, which cannot be divided into {config.blocks} blocks")
    return BlockDiagonal(a, b, config.scaling_of(module), blocks_of_a, blocks_of_b)


BUILDER: Final = ModuleParts(NAME, {"lora_A.weight": "A", "lora_B.weight": "B"}, BlockConfig.parse, _update).builder()
