"""Trainable tokens alone in PEFT's names (PEFT 0.21, ``peft.TrainableTokensConfig``): ``X.trainable_tokens_delta``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from loratool.checkpoint.fingerprint import hash_tensor
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha
from loratool.formats.builder import Builder
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, letter_of
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.formats.token_rows import ROWS, rows_update
from loratool.updates import Update

NAME: Final = "trainable_tokens"
INDICES: Final = "token_indices"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensConfig(ModuleTargets):
    """The targets, and the rows of each; they are checked with the tensors."""

    token_indices: object

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            AdapterError: a value is missing or impossible.
        """
        return cls(**target_fields(config, source, KINDS[NAME].keys), token_indices=config.get(INDICES))


def tokens_update(module: str, parts: Parts, config: TokensConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: it is not a matrix.
        AdapterError: the rows and their numbers do not fit together.
    """
    return rows_update(
        letter_of(parts, "T", axes=2), config.token_indices, INDICES, config.source, kind=KINDS[NAME].title
    )


PARTS: Final = ModuleParts(NAME, {ROWS: "T"}, TokensConfig.parse, tokens_update)


def read_tokens(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read trainable tokens.

    Raises:
        UnsupportedError: it uses a feature that loratool does not compute.
        AdapterError: it is damaged or incomplete, or has no configuration.
    """
    settings = TokensConfig.parse(files.config, files.config_source)
    rows = {module: parts["T"] for module, parts in PARTS.collected(files).items()}
    own = {hash_tensor(info) for module, info in rows.items() if settings.targets(module)}
    # PEFT saves the rows again for a head that is tied to a targeted embedding.
    again = {info.name for module, info in rows.items() if not settings.targets(module) and hash_tensor(info) in own}
    kept = {name: info for name, info in files.tensors.items() if name not in again}
    return PARTS.read(replace(files, tensors=kept), given)


BUILDER: Final = Builder(read_tokens, TokensConfig.parse, PARTS.updates, PARTS.key)
