"""The factors of an update, loaded into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratool.architecture import module_of
from loratool.errors import UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.kinds import kind_named
from loratool.updates import Factored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of ``scaling * B A``: A (r, in_features) and B (out_features, r), fp32, on the CPU."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def load_factors(update: Factored) -> Factors:
    """Read the factors of an update.

    Raises:
        AdapterError: a value is NaN or infinite.
    """
    a, b = update.read_factors()
    return Factors(a, b, update.scaling)


def refuse_replacements(adapter: Adapter) -> None:
    """Raise UnsupportedError if an adapter replaces a tensor whole, so that it has no weighted sum with others."""
    for tensor in (*adapter.replacements, *adapter.own_base):
        raise UnsupportedError(
            f"{quoted(adapter.name)} replaces {quoted(tensor)} whole (modules_to_save), so there is no weighted sum with other "
            "adapters; combine adapters without such modules"
        )


def factored(adapter: Adapter) -> dict[str, Factored]:
    """Return the updates of an adapter that are products of two matrices, by module. Replacements are left out.

    Raises:
        UnsupportedError: another update is not such a product, or there is none.
    """
    found: dict[str, Factored] = {}
    for parameter, update in adapter.changes.items():
        if isinstance(update, Factored):
            found[module_of(parameter)] = update
        elif not update.replaces:
            raise UnsupportedError(
                f"the update of {quoted(module_of(parameter))} in {quoted(adapter.name)} is {quoted(update.kind)}, which is "
                "not a product of two matrices, so its rank cannot change"
            )
    if not found:
        raise UnsupportedError(
            f"{quoted(adapter.name)} ({kind_named(adapter.kind).title}) holds no product of two matrices, so it has no rank"
        )
    return found
