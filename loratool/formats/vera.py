"""VeRA (arXiv:2310.11454) in PEFT's names (PEFT 0.21, ``peft.VeraConfig``), and how it and PVeRA share projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loratool.errors import AdapterError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.loadable import whole
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.rank_config import ModuleRanks, module_rank_fields
from loratool.updates import Update
from loratool.updates.vera import DrawnVera, Vera

NAME: Final = "vera"
SAVED: Final = "save_projection"
SEED: Final = "projection_prng_key"
SHARED: Final = ("A", "B")
LAMBDAS: Final = ("lambda_b", "lambda_d")
SEEDS: Final = range(-(2**63), 2**64)
"""Seeds that torch accepts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig(ModuleRanks):
    """Targets, r, and the `seed` of projections that are not saved; None if they are."""

    seed: int | None


def projection_parser(kind: str) -> Callable[[Mapping[str, Any], str], ProjectionConfig]:
    """Return the parser of a type whose projections are saved, as is PEFT's default, or drawn."""

    def parse(config: Mapping[str, Any], source: str) -> ProjectionConfig:
        saved = ConfigReader(config, source).flag(SAVED) if SAVED in config else True
        fields = module_rank_fields(config, source, KINDS[kind].keys)
        return ProjectionConfig(**fields, seed=None if saved else _seed(config, source))

    return parse


def _seed(config: Mapping[str, Any], source: str) -> int:
    seed = whole(config.get(SEED, 0))
    if type(seed) is not int or seed not in SEEDS:
        raise AdapterError(
            f"{quoted(source)} does not save its projections, and {quoted(SEED)} is {quoted(seed, 40)}; it must be "
            "the whole number that they were drawn from"
        )
    return seed


def shared_projections(
    parts: Parts, module: str, config: ProjectionConfig, saved: type[Vera], drawn: type[DrawnVera]
) -> Update:
    """Return the update of a module.

    Raises:
        UnfitError: a tensor is missing, or does not fit the others or the configuration.
    """
    vectors = [letter_of(parts, letter, axes=1) for letter in LAMBDAS]
    rank = vectors[1].shape[0]
    expected = saved.halves * config.rank_of(module)
    if rank != expected:
        raise UnfitError(f"has a lambda_d of {rank} numbers and the configuration says {expected}")
    tensors = dict(zip(LAMBDAS, vectors, strict=True))
    if config.seed is not None:
        if any(letter in parts for letter in SHARED):
            raise UnfitError(
                f"has projections in the file, which PEFT would ignore because {quoted(SAVED)} is false; set it to true"
            )
        return drawn(tensors, seed=config.seed)
    a, b = (letter_of(parts, letter, axes=2) for letter in SHARED)
    refuse_shape(a, (rank, a.shape[1]))
    refuse_shape(b, (b.shape[0], config.rank_of(module)))
    if b.shape[0] < vectors[0].shape[0]:
        raise UnfitError(f"has {vectors[0].shape[0]} outputs and {quoted(b.name)} has {b.shape[0]} rows")
    return saved({**tensors, "A": a, "B": b})


def _update(module: str, parts: Parts, config: ProjectionConfig) -> Update:
    return shared_projections(parts, module, config, Vera, DrawnVera)


BUILDER: Final = ModuleParts(
    NAME,
    {f"vera_{letter}": letter for letter in LAMBDAS},
    projection_parser(NAME),
    _update,
    {f"vera_{letter}": letter for letter in SHARED},
).builder()
