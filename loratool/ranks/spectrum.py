"""The spectrum of an adapter: the singular values of each module's update, and how much of it each rank keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from loratool.formats.adapter import Adapter, path_of
from loratool.ranks.factored_svd import factored_svd
from loratool.ranks.factors import factored, load_factors

ORDER: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The order in which data flow through a block of a Llama. Other modules follow, sorted by name."""


@dataclass(frozen=True, slots=True)
class Group:
    """The modules of one name, such as ``q_proj``, from all layers.

    Attributes:
        name: the last component of the modules' names.
        modules: the number of modules.
        values: the root mean square over the modules of the first singular value, the second, and so on.
        energy: for each rank from 1, the share of the sum of all squared singular values that it keeps, up to 1.
    """

    name: str
    modules: int
    values: tuple[float, ...]
    energy: tuple[float, ...]


def singular_values(adapter: Adapter) -> dict[str, tuple[float, ...]]:
    """Return the singular values of each module's ``scaling * B A``, largest first, computed from its factors in fp64.

    Raises:
        UnsupportedError: an update is not a product of factors.
        AdapterError: a factor holds NaN or infinity.
    """
    values = {}
    for module, update in sorted(factored(adapter).items()):
        factors = load_factors(update)
        found = factored_svd(factors.b, factors.a)[1] * abs(factors.scaling) if update.rank else ()
        values[module] = tuple(float(value) for value in found)
    return values


def groups(values: Mapping[str, tuple[float, ...]]) -> tuple[Group, ...]:
    """Group an adapter's modules by the last component of their names, in the order of `flow`."""
    members: dict[str, list[tuple[float, ...]]] = {}
    for module, found in values.items():
        members.setdefault(path_of(module)[-1], []).append(found)
    return tuple(group_of(name, members[name]) for name in sorted(members, key=flow))


def group_of(name: str, spectra: Iterable[tuple[float, ...]]) -> Group:
    """Return the group of modules with these singular values. A module's values beyond its own rank count as 0."""
    members = list(spectra)
    squares = [
        sum(found[place] ** 2 for found in members if place < len(found)) for place in range(max(map(len, members)))
    ]
    total = sum(squares)
    energy = [kept / total if total else 1.0 for kept in accumulate(squares)]
    return Group(name, len(members), tuple((square / len(members)) ** 0.5 for square in squares), tuple(energy))


def flow(name: str) -> tuple[int, str]:
    """The sort key of a module name's last component, by ORDER."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)
