"""Opening the catalogue for a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from loratool.checkpoint.unfinished import are_in, noting_in
from loratool.interrupts import whole
from loratool.library.places.home_folder import RUNNING
from registry import Registry, home, registry_url
from registry.notices import say
from registry.store import Staged

whole(Staged.discard)  # an interrupt would leave half of a removed copy in the store


@contextmanager
def open_registry(url: str | None = None, *, read_only: bool = False, settled: bool = True,
                  examined: bool = False) -> Iterator[Registry]:  # fmt: skip
    """Open the catalogue at `url`, at LORATOOL_REGISTRY, or in the home folder; outputs of the block are noted there.

    With `settled`, outputs of killed runs are catalogued first. A warning is printed once if the catalogue is empty but the
    store is not, except with `examined`, where the caller reports it.
    """
    notes = home() / RUNNING
    with Registry.open(home(), url or registry_url(), read_only=read_only) as catalogue, noting_in(notes):
        if settled and are_in(notes):
            from loratool.library.recording.promised import settle

            settle(catalogue, notes)
        if not examined and (note := catalogue.lost_note()) is not None:
            _say_once(note)
        yield catalogue


@cache
def _say_once(note: str) -> None:
    say(note)
