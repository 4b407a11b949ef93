"""(IA)^3 (arXiv:2205.05638) in PEFT's names (PEFT 0.21, ``peft.IA3Config``): one vector of factors for each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS, NOT_YET
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of
from loratool.formats.module_patterns import matches
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.ia3 import Ia3, Ia3Bias

NAME: Final = "ia3"
FEEDFORWARD: Final = "feedforward_modules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3Config(ModuleTargets):
    """Targets, and which of them are feed-forward layers, whose inputs are multiplied; None if the shapes show it."""

    feedforward_modules: str | tuple[str, ...] | None

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration; raises like `ModuleTargets.parse`."""
        fields = target_fields(config, source, KINDS[NAME].keys)
        return cls(**fields, feedforward_modules=ConfigReader(config, source).names(FEEDFORWARD, None))

    def is_feedforward(self, module: str) -> bool | None:
        """Return whether a module is a feed-forward layer (``IA3Model._check_target_module_feedforward``); None if unstated."""
        named = self.feedforward_modules
        if named is None:
            return None
        if isinstance(named, str):
            return matches(named, module, self.source, whole=True) is not None
        return module.endswith(named)


def ia3_update(module: str, parts: Parts, config: Ia3Config) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it is a convolution.
        UnfitError: its vector has another shape than the configuration asks for.
    """
    vector = letter_of(parts, "l")
    if len(vector.shape) in (4, 5):
        raise UnsupportedError(
            f"{quoted(vector.name)} has shape {list(vector.shape)}, that of a convolution: {NOT_YET}"
        )
    by_input = config.is_feedforward(module)
    if len(vector.shape) != 2 or 1 not in vector.shape:
        raise UnfitError(
            f"has {quoted(vector.name)} of shape {list(vector.shape)}, which is neither a row nor a column"
        )
    if by_input is None:
        by_input = vector.shape[0] == 1
    if vector.shape[0 if by_input else 1] != 1:
        stated = "is one" if by_input else "is none"
        raise UnfitError(
            f"has {quoted(vector.name)} of shape {list(vector.shape)}, and {FEEDFORWARD} says that it {stated} of them; correct "
            "that"
        )
    return Ia3(parts, by_input)


def _bias(update: Update) -> Update | None:
    """Return the update of the bias: where outputs are multiplied, so is the bias."""
    return Ia3Bias(update.tensors) if isinstance(update, Ia3) and not update.by_input else None


BUILDER: Final = ModuleParts(NAME, {"ia3_l": "l"}, Ia3Config.parse, ia3_update, bias=_bias).builder()
