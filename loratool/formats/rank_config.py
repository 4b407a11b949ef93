"""The settings of kinds that have a rank and an alpha for each module, with the rules by which PEFT applies its patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loratool.formats.config_reader import ConfigReader
from loratool.formats.module_patterns import pattern_key
from loratool.formats.module_targets import ModuleTargets, target_fields

RANK_KEYS: Final = frozenset({"r", "rank_pattern", "alpha_pattern"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRanks(ModuleTargets):
    """Ranks and targets of an adapter whose type has no alpha, or none that matters."""

    r: int
    rank_pattern: Mapping[str, int]

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives `module`."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module, self.source), self.r)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig(ModuleRanks):
    """Ranks, alphas and targets of an adapter."""

    alpha: float
    alpha_pattern: Mapping[str, float]

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the configuration gives `module`."""
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module, self.source), self.alpha)

    def scaling_of(self, module: str) -> float:
        """Return the scaling, ``alpha / r``."""
        return self.alpha_of(module) / self.rank_of(module)


def module_rank_fields(config: Mapping[str, Any], source: str, own_keys: frozenset[str]) -> dict[str, Any]:
    """Return the checked fields of `ModuleRanks`; ``rank_pattern`` counts only if it is one of the type's `own_keys`.

    Raises:
        AdapterError: a value is missing or impossible.
    """
    read = ConfigReader(config, source)
    patterns = read.mapping("rank_pattern") if "rank_pattern" in own_keys else []
    return target_fields(config, source, own_keys) | {
        "r": read.positive_int("r"),
        "rank_pattern": {key: read.positive_int(key, value) for key, value in patterns},
    }


def rank_fields(
    config: Mapping[str, Any], source: str, alpha_key: str, own_keys: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the checked fields of `RankConfig`; `alpha_key` is the type's name for alpha.

    Raises:
        AdapterError: a value is missing or impossible.
    """
    read = ConfigReader(config, source)
    return module_rank_fields(config, source, own_keys | RANK_KEYS | {alpha_key}) | {
        "alpha": read.number(alpha_key),
        "alpha_pattern": {key: read.number(key, value) for key, value in read.mapping("alpha_pattern")},
    }


def module_ranks_parser(own_keys: frozenset[str]) -> Callable[[Mapping[str, Any], str], ModuleRanks]:
    """Return the parser of a type that has ranks and no alpha."""
    return lambda config, source: ModuleRanks(**module_rank_fields(config, source, own_keys))


def rank_parser(alpha_key: str, own_keys: frozenset[str]) -> Callable[[Mapping[str, Any], str], RankConfig]:
    """Return the parser of a type that has ranks and alphas and nothing else that changes numbers."""
    return lambda config, source: RankConfig(**rank_fields(config, source, alpha_key, own_keys))


def without_patterns(config: Mapping[str, Any], source: str, alpha_key: str, own_keys: frozenset[str]) -> RankConfig:
    """Parse a type that has one rank and one alpha for all modules, so that PEFT ignores patterns."""
    patterns = RANK_KEYS - {"r"}
    fields = rank_fields(
        {key: value for key, value in config.items() if key not in patterns}, source, alpha_key, own_keys
    )
    ignored = (*fields["unknown"], *(key for key in config if key in patterns))
    return RankConfig(**{**fields, "unknown": tuple(sorted(ignored))})
