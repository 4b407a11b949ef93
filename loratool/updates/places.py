"""Updates whose numbers are drawn for all parameters that their adapter changes, also inside of other updates."""

from __future__ import annotations

from dataclasses import replace

from loratool.updates import DrawnUpdate, Places, Update
from loratool.updates.based import Based
from loratool.updates.part import SomeOutputs


def whole_of(update: Update) -> Update:
    """Return the update as its adapter has it, of a whole parameter."""
    while isinstance(update, Based | SomeOutputs):
        update = update.update if isinstance(update, Based) else update.whole
    return update


def among(update: Update, places: Places) -> Update:
    """Return an update, told the parameters that its adapter changes if its numbers are drawn for these."""
    if isinstance(update, Based):
        return replace(update, update=among(update.update, places))
    if isinstance(update, SomeOutputs):
        return replace(update, whole=among(update.whole, places))
    return update.among(places) if isinstance(update, DrawnUpdate) else update
