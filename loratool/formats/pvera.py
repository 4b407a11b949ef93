"""PVeRA (arXiv:2512.07703) in PEFT's names (PEFT 0.21, ``peft.PveraConfig``); merged is its mean, as in PEFT."""

from __future__ import annotations

from typing import Final

from loratool.formats.module_parts import ModuleParts, Parts
from loratool.formats.vera import LAMBDAS, SHARED, ProjectionConfig, projection_parser, shared_projections
from loratool.updates import Update
from loratool.updates.vera import DrawnPvera, Pvera

NAME: Final = "pvera"


def _update(module: str, parts: Parts, config: ProjectionConfig) -> Update:
    return shared_projections(parts, module, config, Pvera, DrawnPvera)


BUILDER: Final = ModuleParts(
    NAME,
    {f"pvera_{letter}": letter for letter in LAMBDAS},
    projection_parser(NAME),
    _update,
    {f"pvera_{letter}": letter for letter in SHARED},
).builder()
