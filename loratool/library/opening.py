"""Opening the catalogue for a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from loratool.checkpoint.unfinished import are_in, noting_in
from loratool.interrupts import whole
from loratool.library.home_folder import RUNNING
from registry import Registry, home, registry_url
from registry.notices import say
from registry.store import Staged

whole(Staged.discard)  # half of a removed copy would stay in the store


@contextmanager
def open_registry(url: str | None = None, *, read_only: bool = False, settled: bool = True,
                  examined: bool = False) -> Iterator[Registry]:  # fmt: skip
    """The catalogue: at `url`, at LORATOOL_REGISTRY, or in the home folder, where what is written meanwhile is noted.

    What runs that were killed did not come to tell it is entered first, with `settled`. One that is empty beside a store that
    is not is said, once, unless it is to be `examined`.
    """
    notes = home() / RUNNING
    with Registry.open(home(), url or registry_url(), read_only=read_only) as catalogue, noting_in(notes):
        if settled and are_in(notes):
            from loratool.library.promised import settle

            settle(catalogue, notes)
        if not examined and (note := catalogue.lost_note()) is not None:
            _say_once(note)
        yield catalogue


@cache
def _say_once(note: str) -> None:
    say(note)
