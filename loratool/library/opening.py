"""Opening the catalogue for a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loratool.checkpoint.unfinished import are_in, noting_in
from loratool.library.home_folder import RUNNING
from registry import Registry, home, registry_url


@contextmanager
def open_registry(url: str | None = None, *, read_only: bool = False, settled: bool = True) -> Iterator[Registry]:
    """The catalogue: at `url`, at LORATOOL_REGISTRY, or in the home folder, where what is written meanwhile is noted.

    What runs that were killed did not come to tell it is entered first, with `settled`.
    """
    notes = home() / RUNNING
    with Registry.open(home(), url or registry_url(), read_only=read_only) as catalogue, noting_in(notes):
        if settled and are_in(notes):
            from loratool.library.promised import settle

            settle(catalogue, notes)
        yield catalogue
