"""C3A (arXiv:2407.19342) in PEFT's names (PEFT 0.21, ``peft.C3AConfig``): the kernels of the circulant blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.c3a import C3a

NAME: Final = "c3a"


@dataclass(frozen=True, slots=True, kw_only=True)
class C3aConfig(ModuleTargets):
    """Targets, and the sizes that blocks may have."""

    sizes: frozenset[int]

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration; raises like `ModuleTargets.parse`."""
        read = ConfigReader(config, source)
        patterns = (read.positive_int(key, value) for key, value in read.mapping("block_size_pattern"))
        return cls(
            **target_fields(config, source, KINDS[NAME].keys),
            sizes=frozenset({read.positive_int("block_size"), *patterns}),
        )


def c3a_update(module: str, parts: Parts, config: C3aConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: its kernel is missing or of another size than the configuration says.
    """
    kernel = letter_of(parts, "kernel", axes=3)
    if kernel.shape[2] not in config.sizes:
        raise UnfitError(
            f"has blocks of {kernel.shape[2]}, and the configuration says {quoted(sorted(config.sizes), 60)}"
        )
    return C3a(parts)


BUILDER: Final = ModuleParts(NAME, {"c3a_kernel": "kernel"}, C3aConfig.parse, c3a_update).builder()
