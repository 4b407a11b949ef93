"""Which commands work on an adapter, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from loratool.errors import AdapterError
from loratool.formats.adapter import Adapter
from loratool.formats.identity import AnyAdapter, Identity
from loratool.ranks.factors import factored, refuse_replacements
from loratool.ranks.prune import refuse_no_triplets

WORKS: Final = "works"


def _any(adapter: Adapter) -> None:
    """Accept every adapter that loratool computes."""


def _products(adapter: Adapter) -> None:
    factored(adapter)


def _sums(adapter: Adapter) -> None:
    factored(adapter)
    refuse_replacements(adapter)


_COMPUTING: Final[Mapping[str, Callable[[Adapter], object]]] = {
    "merge": _any,
    "eval": _any,
    "combine": _sums,
    "truncate": _products,
    "prune": refuse_no_triplets,
    "show --spectrum": _products,
    "push": _any,
}
"""Commands that take an adapter's numbers, each with the check that it makes by what the adapter is."""

_COPYING: Final = ("export",)
_NAMING: Final = ("tag", "remove")


def commands_for(adapter: AnyAdapter | str) -> dict[str, str]:
    """Return for each command ``works``, or why it does not work on an adapter.

    What else a command asks for, such as a base that fits, is not looked at. For an adapter whose files cannot be read, give
    the reason in its place.
    """
    if isinstance(adapter, str):
        return {**dict.fromkeys((*_COMPUTING, *_COPYING), adapter), **dict.fromkeys(_NAMING, WORKS)}
    if isinstance(adapter, Identity):
        found = dict.fromkeys(_COMPUTING, str(adapter.why_not))
    else:
        found = {name: _outcome(adapter, check) for name, check in _COMPUTING.items()}
    return {**found, **dict.fromkeys((*_COPYING, *_NAMING), WORKS)}


def _outcome(adapter: Adapter, check: Callable[[Adapter], object]) -> str:
    try:
        check(adapter)
    except AdapterError as error:
        return str(error)
    return WORKS
