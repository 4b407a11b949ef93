"""Tuned layer norms in PEFT's names (Zhao et al. 2023, arXiv:2312.11420; PEFT 0.21, ``peft.LNTuningConfig``).

``X.ln_tuning_layers.weight`` and ``.bias`` are a copy of the whole module X, which replaces the base's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha
from loratool.formats.builder import Builder
from loratool.formats.module_parts import ModuleParts, Parts, letter_of
from loratool.formats.module_targets import ModuleTargets
from loratool.updates import Update
from loratool.updates.replacement import Replacement

NAME: Final = "ln_tuning"
LEAVES: Final = ("weight", "bias")


def norm_update(module: str, parts: Parts, config: ModuleTargets) -> Update:
    """Return the update of a module's weight.

    Raises:
        MissingError: it has none.
    """
    return Replacement(letter_of(parts, "weight"), NAME)


PARTS: Final = ModuleParts(
    NAME, {f"ln_tuning_layers.{leaf}": leaf for leaf in LEAVES}, ModuleTargets.parse, norm_update
)


def read_norms(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read tuned norms with their biases.

    Raises:
        UnsupportedError: it uses a feature that loratool does not compute.
        AdapterError: it is damaged or incomplete, or has no configuration.
    """
    adapter = PARTS.read(files, given)
    changes = {
        f"{module}.{leaf}": Replacement(info, NAME)
        for module, parts in PARTS.collected(files).items()
        for leaf, info in parts.items()
    }
    return replace(adapter, changes=changes)


BUILDER: Final = Builder(read_norms, ModuleTargets.parse, PARTS.updates, PARTS.key)
