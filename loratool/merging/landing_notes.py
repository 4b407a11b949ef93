"""Notes of a plan: where an adapter lands in a base, and what it leaves as it is."""

from __future__ import annotations

from loratool.architecture import Architecture, module_of
from loratool.checkpoint.file_role import holds_weights
from loratool.checkpoint.model import Checkpoint
from loratool.errors import quoted
from loratool.formats.adapter import Adapter
from loratool.formats.landing import Landing
from loratool.formats.module_targets import ALL_LINEAR
from loratool.formats.names import SUFFIX


def landing_notes(adapter: Adapter, landing: Landing, architecture: Architecture) -> list[str]:
    """Return notes on where an adapter lands in a base, and on modules that it targets and lacks."""
    notes = [
        f"{quoted(adapter.name)} names its modules {quoted(exchange.old + '…')} and the base "
        f"{quoted(exchange.new + '…')}: matched by that exchange of prefixes"
        for exchange in landing.exchanges
    ]
    notes += _table_notes(adapter, landing, architecture)
    without = left_out(adapter, landing, architecture)
    if without:
        notes.append(
            f"{quoted(adapter.name)} targets {len(without)} more modules of the base without holding tensors for them "
            f"({quoted(without[0])}, ...): they stay as they are, as in PEFT"
        )
    return notes


def left_out(adapter: Adapter, landing: Landing, architecture: Architecture) -> list[str]:
    """Return the modules of the base that an adapter's configuration targets and its file lacks, by the adapter's names."""
    config = adapter.settings
    if config.target_modules in (None, ALL_LINEAR):
        return []
    landed = {name for names in landing.names.values() for name in names}
    matrices = (
        name
        for name, info in architecture.tensors.items()
        if len(info.shape) == 2 and name.endswith(SUFFIX) and name not in landed
    )
    parameters = {landing.parameter(name): name for name in matrices}
    return sorted(
        module_of(parameter)
        for parameter, name in parameters.items()
        if parameter is not None
        and parameter not in adapter.changes
        and config.targets(module_of(parameter))
        and not architecture.is_embedding(name)
    )


def _table_notes(adapter: Adapter, landing: Landing, architecture: Architecture) -> list[str]:
    """Return a note on parameters whose places are known from the tables of the base's architecture."""
    if not landing.by_tables:
        return []
    first = landing.by_tables[0]
    others = f" and {len(landing.by_tables) - 1} more" if landing.by_tables[1:] else ""
    return [
        f"{quoted(first)}{others} of {quoted(adapter.name)} land under other names, as {quoted(landing.names[first][0])}: "
        f"matched by what is known of models of type {quoted(architecture.config.get('model_type'), 40)}"
    ]


def other_weights(base: Checkpoint) -> list[str]:
    """Return a note on weight files in the base's folder that are not part of its model and are copied unchanged."""
    others = [str(name) for name in base.other_files() if holds_weights(name)]
    if not others:
        return []
    return [
        f"the base also holds {quoted(others[0])}{' and more weights' if others[1:] else ''}: copied without the adapter"
    ]
