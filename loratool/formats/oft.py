"""OFT (arXiv:2306.07280) in PEFT's names: ``oft_R.weight`` since PEFT 0.16 (``peft.OFTConfig``), ``oft_r`` and ``oft_s`` before.

PEFT 0.14 and 0.15 saved blocks R and a factor for each output; earlier versions had no factors, and rotated the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import KINDS
from loratool.formats.module_parts import ModuleParts, Parts, UnfitError, letter_of, refuse_shape
from loratool.formats.module_targets import ModuleTargets, target_fields
from loratool.updates import Update
from loratool.updates.boft import Boft
from loratool.updates.oft import Oft, side_of

NAME: Final = "oft"
TERMS: Final = 5
"""Number of terms of the Neumann series where the configuration has none."""

MOST_TERMS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OftConfig(ModuleTargets):
    """Targets, whether all inputs share one block, and the terms of the Neumann series, or None for Cayley's transform."""

    shares: bool
    terms: int | None

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            UnsupportedError: it constrains the rotations, or asks for too many terms.
            AdapterError: a value is impossible.
        """
        read = ConfigReader(config, source)
        fields = target_fields(config, source, KINDS[NAME].keys)
        if read.flag("coft"):
            raise UnsupportedError(
                f"{quoted(source)} constrains its rotations (coft), which PEFT does anew whenever it loads or merges them, with "
                "other last bits each time; load it in PEFT, merge and unmerge it once, set coft to False in its peft_config, "
                "and save it"
            )
        series = config.get("use_cayley_neumann") is None or read.flag("use_cayley_neumann")
        stated = config.get("num_cayley_neumann_terms")
        terms = read.positive_int("num_cayley_neumann_terms") if series and stated is not None else TERMS
        if terms > MOST_TERMS:
            raise UnsupportedError(f"{quoted(source)} asks for {terms} terms of a series; {MOST_TERMS} are the most")
        return cls(**fields, shares=read.flag("block_share"), terms=terms if series else None)


def oft_update(module: str, parts: Parts, config: OftConfig) -> Update:
    """Return the update of a module.

    Raises:
        UnsupportedError: it rotates outputs.
        UnfitError: a tensor is missing or has an impossible shape.
    """
    if "r" in parts:
        return _older_update(parts, config)
    triangles = letter_of(parts, "R", axes=2)
    if side_of(triangles) < 2:
        raise UnfitError(
            f"has {quoted(triangles.name)} of shape {list(triangles.shape)}, which holds no upper triangles"
        )
    if config.shares and triangles.shape[0] != 1:
        raise UnfitError(
            f"has {triangles.shape[0]} blocks, and the configuration says that all inputs share one (block_share)"
        )
    return Oft({"R": triangles}, config.terms, config.shares)


def _older_update(parts: Parts, config: OftConfig) -> Update:
    """Return the update of a module of PEFT 0.14 or 0.15."""
    r = letter_of(parts, "r", axes=3)
    if "s" not in parts:
        raise UnsupportedError(
            f"{quoted(r.name)} has no oft_s beside it: before PEFT 0.14, OFT rotated outputs, which loratool does not compute; "
            "merge it with the PEFT that trained it"
        )
    blocks, n, _ = r.shape
    refuse_shape(r, (blocks, n, n))
    s = letter_of(parts, "s", axes=2)
    refuse_shape(s, (s.shape[0], 1))
    if config.shares and blocks != 1:
        raise UnfitError(f"has {blocks} blocks, and the configuration says that all inputs share one (block_share)")
    return Boft({"R": r, "s": s}, NAME, config.shares)


BUILDER: Final = ModuleParts(
    NAME, {"oft_R.weight": "R", "oft_r": "r", "oft_s": "s"}, OftConfig.parse, oft_update
).builder()
