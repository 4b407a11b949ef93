"""Where each parameter of an adapter lands in a checkpoint: on one stored tensor, on parts of it, or on parts of several.

Names decide first, by the written rules of `formats.names`. What lands by none of them goes by the tables of the model's
architecture, which know the names that programs give to one parameter, and the matrices that a parameter packs. A LoRA on
``q_proj`` lands so on a third of a stored ``qkv_proj``, and one on a stack of experts on a tensor for each expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from loratool.architecture import ALL, WHOLE, Architecture, Matrix, Place, View, module_of
from loratool.errors import AdapterError, PlacementError, quoted
from loratool.formats.names import (
    Exchange,
    NotAllLandError,
    Shape,
    find_exchanges,
    land_by_names,
    loose_place,
    not_landed,
    refuse_mixed_stacks,
    stack_of,
)
from loratool.updates.expert_factors import Stacked
from loratool.updates.shapes import fits_turned


@dataclass(frozen=True)
class Landing:
    """Where the parameters of an adapter land.

    Attributes:
        tensors: the places of each parameter.
        exchanges: the exchanges of prefixes that were used; none if the names are equal.
        by_tables: the parameters that landed by the tables of the architecture.
    """

    tensors: Mapping[str, tuple[Place, ...]]
    exchanges: tuple[Exchange, ...] = ()
    by_tables: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """The tensors that each parameter lands on."""
        return {name: tuple(dict.fromkeys(place.name for place in places)) for name, places in self.tensors.items()}

    def place(self, name: str, tensors: Collection[str]) -> str | None:
        """Return the tensor that another parameter lands on, by its name or by rule 4 of `formats.names`.

        None if it lands nowhere or the place is ambiguous.
        """
        place = name if name in tensors else loose_place(name, self.exchanges, tensors)
        if place is None or not stack_of(name):
            return place
        home, stack = self._homes.get(stack_of(name)), stack_of(place)
        is_home = home == stack if home is not None else stack not in self._inhabited
        return place if is_home else None

    @cached_property
    def _homes(self) -> dict[str, str]:
        """The stack of layers that each stack of the adapter lands in."""
        return {stack_of(name): stack_of(places[0].name) for name, places in self.tensors.items()}

    @cached_property
    def _inhabited(self) -> frozenset[str]:
        return frozenset(self._homes.values())

    def parameter(self, tensor: str) -> str | None:
        """Return the parameter that would land on `tensor`, or None if there is none."""
        longest_first = sorted(self.exchanges, key=lambda exchange: -len(exchange.new))
        return next(filter(None, (each.reverse(tensor) for each in (*longest_first, Exchange("", "")))), None)


def land(parameters: Mapping[str, Shape], architecture: Architecture, source: str,
         replaced: Mapping[str, Shape] = MappingProxyType({}),
         stacks: Mapping[str, Stacked] = MappingProxyType({})) -> Landing:  # fmt: skip
    """Find the places of the parameters of the adapter `source`.

    Args:
        parameters: the shape that the update of each parameter fits, (out_features, in_features) for a matrix.
        architecture: the base's, with its tensors as they are stored.
        replaced: the shapes of the parameters that follow the others, such as those that the adapter holds whole. One that lands
          nowhere keeps its own name.

    Raises:
        PlacementError: a parameter lands on no tensor, on several by one name, or where another lands; or a stack of layers
          lands in two, or two stacks land in one.
    """
    found = _Finder(architecture, source)
    found.land(parameters)
    found.land_stacks(stacks)
    landing = Landing(found.places, tuple(dict.fromkeys(found.exchanges)), tuple(found.by_tables))
    whole, by_tables = _land_replaced(replaced, landing, architecture)
    landing = replace(landing, tensors={**landing.tensors, **whole}, by_tables=(*landing.by_tables, *by_tables))
    _refuse_collisions(found.places, architecture, source)
    refuse_mixed_stacks(found.by_names, source)
    return landing


class _Finder:
    """The places that were found so far."""

    def __init__(self, architecture: Architecture, source: str) -> None:
        self._architecture = architecture
        self._source = source
        self.places: dict[str, tuple[Place, ...]] = {}
        self.exchanges: list[Exchange] = []
        self.by_tables: list[str] = []
        self.by_names: dict[str, str] = {}

    def land(self, parameters: Mapping[str, Shape]) -> None:
        tensors = self._architecture.tensors
        landed = land_by_names(parameters, tensors)
        rest = {name: shape for name, shape in parameters.items() if name not in landed}
        for name, tensor in landed.items():
            fits = len(parameters[name]) != STACKED and fits_turned(parameters[name], tensors[tensor].shape)
            self.places[name] = () if fits else places_by_tables(name, parameters[name], self._architecture)
            self.places[name] = self.places[name] or (Place(WHOLE, tensor, WHOLE),)
        try:
            landed |= self._by_exchange(rest)
        except NotAllLandError as error:
            rest = self._by_tables(rest)
            try:
                landed |= self._by_exchange(rest)
            except NotAllLandError as of_rest:
                self._by_tables_and_exchange(rest, of_rest if self.by_tables else error)
        self.by_names = landed

    def land_stacks(self, stacks: Mapping[str, Stacked]) -> None:
        """Land updates of stacks: one place, or several, for each expert.

        Raises:
            PlacementError: the checkpoint lacks some of the experts, or has more.
            AdapterError: whether a square matrix is the transpose of the update's product cannot be known.
        """
        known = self._architecture
        matrices = {name: self._matrices_of(name, stack) for name, stack in stacks.items()}
        names = {each.name: each.name for found in matrices.values() for each in found}
        names |= self._renamed({name: each for name, each in matrices.items() if not self._holds(name, each)}, stacks)
        places = {}
        for name, stack in stacks.items():
            found = [Place(each.view, *known.holders[names[each.name]]) for each in matrices[name]]
            self._refuse_more_experts(name, stack, names[matrices[name][-1].name], matrices[name][-1].name)
            places[name] = tuple(self._oriented(name, stack, place) for place in joined(found, known))
        self.places |= places
        self.by_tables += [name for name, found in places.items() if any(place.name != name for place in found)]

    def _matrices_of(self, name: str, stack: Stacked) -> tuple[Matrix, ...]:
        """Return the matrices of a stack, by the orientation under which most of them fit the checkpoint's."""
        experts, rows, columns = stack.shape
        known = self._architecture

        def fitting(matrices: Iterable[Matrix], shape: Shape) -> int:
            held = ((each, known.holders.get(each.name)) for each in matrices)
            return sum(
                each.view.shape_in(shape) == at[1].shape_in(known.tensors[at[0]].shape) for each, at in held if at
            )

        shapes = ((experts, rows, columns), (experts, columns, rows))
        found = [known.matrices(name, shape) for shape in shapes]
        best = max(range(2), key=lambda index: fitting(found[index], shapes[index]))
        return found[best]

    def _holds(self, name: str, matrices: Sequence[Matrix]) -> bool:
        """Return whether the checkpoint holds the matrices of a stack under these names."""
        holders = self._architecture.holders
        if matrices[0].view.expert is None:
            return False
        held = [each.name in holders for each in matrices]
        if held[0] and not held[-1]:
            raise PlacementError(
                f"{quoted(name)} of {quoted(self._source)} has {matrices[-1].view.expert or 0} experts or more, and the base has "
                f"less, as in {quoted(holders[matrices[0].name][0])}; is it the right base?"
            )
        return all(held)

    def _renamed(self, matrices: Mapping[str, Sequence[Matrix]], stacks: Mapping[str, Stacked]) -> dict[str, str]:
        """Return the names that the matrices of these stacks have by an exchange of prefixes."""
        holders, tensors = self._architecture.holders, self._architecture.tensors
        if not matrices:
            return {}
        stored = {name: _Part(view.shape_in(tensors[at].shape)) for name, (at, view) in holders.items()}
        own = {each.name: each.view.shape_in(stacks[name].shape) for name, found in matrices.items() for each in found}
        try:
            exchanges = find_exchanges(own, stored, self._source)
        except NotAllLandError:
            exchanges = {}
        if not exchanges or any(found[0].view.expert is None for found in matrices.values()):
            raise not_landed({name: stacks[name].shape for name in matrices}, None, tensors, self._source)
        return {name: exchange.rename(name) or name for name, exchange in exchanges.items()}

    def _refuse_more_experts(self, name: str, stack: Stacked, last: str, own: str) -> None:
        """Raise PlacementError if the checkpoint has more experts than an update.

        `last` is the checkpoint's name of the last matrix, and `own` the adapter's.
        """
        experts, rows, columns = stack.shape
        more = self._architecture.matrices(name, (experts + 1, rows, columns))[-1].name.split(".")
        tail = next((len(more) - at for at, part in enumerate(own.split(".")) if part != more[at]), 0)
        next_one = ".".join([*last.split(".")[:-tail], *more[-tail:]])
        if next_one in self._architecture.holders:
            raise PlacementError(
                f"{quoted(name)} of {quoted(self._source)} has {experts} experts, and the base has more, as in "
                f"{quoted(self._architecture.holders[next_one][0])}; is it the right base?"
            )

    def _oriented(self, name: str, stack: Stacked, place: Place) -> Place:
        """Return the place of a matrix, with `own` as a part of the update's product."""
        shape = replace(place.view, outputs=ALL).shape_in(self._architecture.tensors[place.name].shape)
        if place.own.outputs != ALL:  # a part of the matrix, with all of its inputs
            sides, inputs = list(stack.shape[1:]), shape[-1]
            if inputs in sides:
                sides.remove(inputs)
            shape = (sides[0], inputs)
        turned = stack.is_turned(shape, transposed=place.own.transposed)
        if turned is None:
            raise AdapterError(
                f"{quoted(name)} of {quoted(self._source)} changes square matrices, whose orientation depends on the version of "
                'PEFT that trained it; add that to its configuration, such as "peft_version": "0.19.1"'
            )
        return replace(place, own=replace(place.own, transposed=turned))

    def _by_exchange(self, rest: Mapping[str, Shape]) -> dict[str, str]:
        """Land parameters by exchanges of prefixes and return their tensors."""
        if not rest:
            return {}
        exchanges = find_exchanges(rest, self._architecture.tensors, self._source)
        self.exchanges += exchanges.values()
        landed = {name: exchange.rename(name) or name for name, exchange in exchanges.items()}
        self.places |= {name: (Place(WHOLE, tensor, WHOLE),) for name, tensor in landed.items()}
        return landed

    def _by_tables(self, rest: Mapping[str, Shape]) -> dict[str, Shape]:
        """Land the parameters that the tables know, and return the others."""
        found = {name: places_by_tables(name, shape, self._architecture) for name, shape in rest.items()}
        self._add({name: places for name, places in found.items() if places})
        return {name: shape for name, shape in rest.items() if not found[name]}

    def _by_tables_and_exchange(self, rest: Mapping[str, Shape], error: NotAllLandError) -> None:
        """Land parameters whose names differ from the tables' by an exchange of prefixes, too.

        Raises:
            NotAllLandError: `error`, if some do not land so either.
        """
        matrices = {name: self._architecture.matrices(name, shape) for name, shape in rest.items()}
        holders = self._architecture.holders
        stored = {
            name: _Part(view.shape_in(self._architecture.tensors[at].shape)) for name, (at, view) in holders.items()
        }
        own = {each.name: each.view.shape_in(rest[name]) for name in rest for each in matrices[name]}
        try:
            exchanges = find_exchanges(own, stored, self._source)
        except NotAllLandError:
            raise error from None
        names = {name: exchange.rename(name) or name for name, exchange in exchanges.items()}
        refuse_mixed_stacks(names, self._source)
        self._add(
            {
                name: joined(
                    [Place(each.view, *holders[names[each.name]]) for each in matrices[name]], self._architecture
                )
                for name in rest
            }
        )

    def _add(self, places: Mapping[str, tuple[Place, ...]]) -> None:
        self.places |= places
        self.by_tables += places


STACKED = 3
"""Number of dimensions of a stack of experts' matrices."""


@dataclass(frozen=True, slots=True)
class _Part:
    shape: Shape


def places_by_tables(name: str, shape: Shape, architecture: Architecture) -> tuple[Place, ...]:
    """Return the places of a parameter by the tables of the architecture; none if the checkpoint lacks a part of it."""
    matrices, holders = architecture.matrices(name, shape), architecture.holders
    if not all(matrix.name in holders for matrix in matrices):
        return ()
    return joined([Place(matrix.view, *holders[matrix.name]) for matrix in matrices], architecture)


def joined(places: Sequence[Place], architecture: Architecture) -> tuple[Place, ...]:
    """Join the places that together are a whole matrix of a stored tensor, and have the same outputs in the adapter's."""
    groups: dict[tuple[str, int | None, int | None], list[Place]] = {}
    for place in places:
        groups.setdefault((place.name, place.view.expert, place.own.expert), []).append(place)
    found: list[Place] = []
    for (name, _, _), group in groups.items():
        whole = replace(group[0].view, outputs=ALL)
        stored = architecture.tensors[name].shape
        size = sum(each.view.shape_in(stored)[0] for each in group)
        if size == whole.shape_in(stored)[0] and all(each.own.outputs == each.view.outputs for each in group):
            own = group[0].own
            found.append(Place(WHOLE if own.expert is None else replace(own, outputs=ALL), name, whole))
        else:
            found += group
    return tuple(found)


def _land_replaced(replaced: Mapping[str, Shape], landing: Landing,
                   architecture: Architecture) -> tuple[dict[str, tuple[Place, ...]], list[str]]:  # fmt: skip
    """Return the places of parameters that an adapter holds whole, and those among them that landed by tables."""
    found, by_tables = {}, []
    for name, shape in replaced.items():
        tensor = landing.place(name, architecture.tensors)
        places = () if tensor or name in architecture.tensors else places_by_tables(name, shape, architecture)
        by_tables += [name] if places else []
        found[name] = places or (Place(WHOLE, tensor or name, WHOLE),)
    return found, by_tables


def _refuse_collisions(landed: Mapping[str, Iterable[Place]], architecture: Architecture, source: str) -> None:
    """Raise PlacementError if two parameters land on one part of a tensor."""
    taken: dict[str, dict[int | None, list[tuple[str, View]]]] = {}
    for name, places in landed.items():
        for place in places:
            there, expert = taken.setdefault(place.name, {}), place.view.expert
            beside = there.keys() if expert is None else {None, expert}
            for other, view in (each for key in beside for each in there.get(key, ())):
                if view.overlaps(place.view, architecture.tensors[place.name].shape):
                    one, two = quoted(module_of(name)), quoted(module_of(other))
                    raise PlacementError(
                        f"{one} and {two} of {quoted(source)} both land on {quoted(place.name)}; keep one of them"
                    )
            there.setdefault(expert, []).append((name, place.view))
