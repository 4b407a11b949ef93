"""FourierFT (arXiv:2405.03003) in PEFT's names (PEFT 0.21, ``peft.FourierFTConfig``): one vector of numbers for each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import AdapterError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.loadable import whole
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.fourierft import FourierFt

NAME: Final = "fourierft"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyConfig(ModuleTargets):
    """Targets, the scaling, the seed of the places, and the numbers of frequencies that modules may have."""

    scaling: float
    seed: int
    counts: frozenset[int]

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration; raises like `ModuleTargets.parse`."""
        return cls(**frequency_fields(config, source, NAME))


def frequency_fields(config: Mapping[str, Any], source: str, kind: str) -> dict[str, Any]:
    """Return the checked fields of `FrequencyConfig`.

    Raises:
        AdapterError: a value is missing or impossible.
    """
    read = ConfigReader(config, source)
    seed = whole(config.get("random_loc_seed"))
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise AdapterError(
            f"'random_loc_seed' in {quoted(source)} is {quoted(seed, 40)} and must be a whole number of at least 0; without the "
            "right seed, nobody can tell where the frequencies are"
        )
    patterns = (read.positive_int(key, value) for key, value in read.mapping("n_frequency_pattern"))
    return target_fields(config, source, KINDS[kind].keys) | {
        "scaling": read.number("scaling"),
        "seed": seed,
        "counts": frozenset({read.positive_int("n_frequency"), *patterns}),
    }


def fourierft_update(module: str, parts: Parts, config: FrequencyConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: its numbers are missing or not as many as the configuration says.
    """
    c = letter_of(parts, "c", axes=1)
    if c.shape[0] not in config.counts:
        raise UnfitError(
            f"has {c.shape[0]} frequencies, and the configuration says {quoted(sorted(config.counts), 60)}"
        )
    return FourierFt(parts, config.scaling, config.seed)


BUILDER: Final = ModuleParts(NAME, {"fourierft_spectrum": "c"}, FrequencyConfig.parse, fourierft_update).builder()
