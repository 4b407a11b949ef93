"""The commands that work on an adapter, and the reasons why the others do not."""

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
"""Commands that use an adapter's numbers, each with its check of the adapter."""

_COPYING: Final = ("export",)
_NAMING: Final = ("tag", "remove")


def commands_for(adapter: AnyAdapter | str) -> dict[str, str]:
    """Return for each command ``works``, or why it does not work on an adapter.

    Other needs of a command, such as a fitting base, are not checked. If the adapter's files cannot be read, `adapter` is the
    reason.
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
