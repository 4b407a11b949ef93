"""The architecture of one model: the tables of its family, applied to its configuration and its tensors' names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

from loratool.architecture.packing import Matrix, Packing
from loratool.architecture.pattern import NUMBER, component_fits, fill, numbers, template
from loratool.architecture.renaming import Spelling
from loratool.architecture.roles import BY_DIMENSIONS, Role
from loratool.architecture.scope import Scope
from loratool.architecture.tables import generic
from loratool.architecture.view import WHOLE, View


class Shaped(Protocol):
    """A tensor of which only the shape is known."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a part of a parameter elsewhere.

    Attributes:
        own: the part of the requested parameter.
        name: the parameter that holds the same numbers.
        view: the part of that parameter.
    """

    own: View
    name: str
    view: View


@dataclass(frozen=True)
class Architecture:
    """The known facts about a model.

    Methods take any name of a parameter: its name on disk, in memory under transformers 4, or in memory since transformers 5.
    The last is its canonical name.

    Attributes:
        scope: the tables that apply to the model.
        tensors: its tensors by name, as on disk or as in memory.
    """

    scope: Scope
    tensors: Mapping[str, Shaped]

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration."""
        return self.scope.config

    # Names

    def canonical(self, name: str) -> str:
        """Return the name that transformers 5 gives a parameter in memory. Parts of a packed parameter keep their own names."""
        if NUMBER in name:
            return name
        before = template(name, self.scope.literals)
        after = self._canonical.get(before)
        if after is None:
            after = self._canonical[before] = ".".join(self.scope.renamed(tuple(before.split("."))))
        return name if after == before else fill(after, numbers(name, self.scope.literals))

    def spelled(self, canonical: str, spelling: Spelling) -> str:
        """Return the name that `spelling` gives the parameter whose canonical name this is."""
        if spelling is Spelling.TRANSFORMERS_5 or NUMBER in canonical:
            return canonical
        before = template(canonical, self.scope.literals)
        after = ".".join(self.scope.reverted(tuple(before.split(".")), spelling))
        return fill(after, numbers(canonical, self.scope.literals))

    # Roles

    def role(self, parameter: str) -> Role:
        """Return the role of a parameter.

        The tables determine it by name. For an unknown name, the number of dimensions of its module's weight does. A module that
        is named like an embedding but has a bias is a linear layer.
        """
        module = module_of(parameter)
        weight = self.tensors.get(parameter if module == parameter else f"{module}.weight")
        key = template(parameter, self.scope.literals), None if weight is None else len(weight.shape)
        found = self._roles.get(key)
        if found is None:
            found = self._roles[key] = self._role(template(self.canonical(parameter), self.scope.literals), key[1])
        is_lookup = found in (Role.TOKENS, Role.EMBEDDING)
        return Role.LINEAR if is_lookup and f"{module}.bias" in self.tensors else found

    def is_embedding(self, parameter: str) -> bool:
        """Return whether a matrix is a lookup table of rows instead of a linear layer."""
        return self.role(parameter) in (Role.TOKENS, Role.EMBEDDING)

    def weights(self, role: Role) -> tuple[str, ...]:
        """Return the tensors that are weights of modules with this role, in their order."""
        weights = (name for name in self.tensors if name.endswith(".weight"))
        if role not in BY_DIMENSIONS.values():
            # A model with many experts has tens of thousands of names. The last component of the module excludes most.
            ends = {end for end, others in self.scope.ends.items() if role in others}
            may_be: dict[str, bool] = {}
            weights = (name for name in weights if _has_end(name[name.rfind(".", 0, -7) + 1 : -7], ends, may_be))
        return tuple(name for name in weights if self.role(name) is role)

    @property
    def writes_tokens(self) -> bool:
        """Whether the configuration names a class with an output head."""
        return self._class_has("generating")

    @property
    def has_another_head(self) -> bool:
        """Whether the configuration names a class with another head instead of the output head."""
        return self._class_has("headless")

    def _class_has(self, words: str) -> bool:
        names = str(self.config.get("architectures"))
        return any(word in names for word in generic().classes.get(words, ()))

    def transposed(self, parameter: str) -> bool | None:
        """Return whether a matrix is stored as (in, out), or None if no table knows.

        An embedding is: its rows are the outputs of a linear layer for one-hot vectors.
        """
        if self.is_embedding(parameter):
            return True
        for scope, name in self._around(parameter):
            if scope.family.transposed:
                module = module_of(".".join(name)).split(".")
                return any(pattern.matches(module) for pattern in scope.family.transposed)
        return None

    def is_conv1d(self, weight: str) -> bool:
        """Return whether a linear layer is known to be a Conv1D, as in GPT-2, whose dense weight is stored as (in, out)."""
        return not self.is_embedding(weight) and self.transposed(weight) is True

    def reads(self, parameter: str) -> str | None:
        """Return what the linear layer of a parameter reads, such as ``attention input``, or None if that is unknown."""
        module = module_of(template(self.canonical(parameter))).split(".")
        return next((what for pattern, what in generic().reads if pattern.matches(module)), None)

    # Ties

    @property
    def declares_ties(self) -> bool | None:
        """Whether the configuration ties the output head to the input embedding, or None if it does not say.

        The configuration of a text model inside may tie them as well. If that one does not tie them, the question stays open,
        because the whole model has a default of its own.
        """
        inside = self.config.get("text_config")
        text = inside.get("tie_word_embeddings") if isinstance(inside, Mapping) else None
        own = self.config.get("tie_word_embeddings")
        return True if True in (own, text) else own if isinstance(own, bool) else None

    @property
    def ties_embeddings(self) -> bool | None:
        """Whether the output head is tied to the input embedding, by the configuration or else by the default of the family.

        None if no table knows the default.
        """
        declared = self.declares_ties
        return self.scope.family.tie_word_embeddings if declared is None else declared

    def tied(self, parameter: str) -> tuple[str, ...]:
        """Return the canonical names, sorted, of the other parameters that share values with this one.

        A checkpoint may lack them or hold copies.
        """
        own = self.canonical(parameter)
        found: set[str] = set()
        waiting = [own]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self._partners(name)
        return tuple(sorted(found - {own}))

    # Matrices

    def matrices(self, name: str, shape: Sequence[int] | None = None,
                 spelling: Spelling = Spelling.TRANSFORMERS_5) -> tuple[Matrix, ...]:  # fmt: skip
        """Return every matrix that a parameter holds: one, or several if it packs them.

        Two parameters that hold the same matrix give it the same name. By this an adapter lands on a checkpoint that packs its
        matrices differently.

        Args:
            shape: the shape of the parameter; by default that of the tensor with this name.
            spelling: the program whose name this is. It matters if programs use one name differently: Qwen3-VL's experts are
                transposed on disk under the same name.
        """
        if shape is None and name in self.tensors:
            shape = self.tensors[name].shape
        canonical = tuple(self.canonical(name).split("."))
        for packing, before, config in self._packings(canonical):
            found = tuple(packing.matrices(before, canonical, shape or (), config, spelling))
            if found:
                return found
        return (Matrix(".".join(canonical), View(transposed=bool(self.transposed(name)))),)

    def is_reordered(self, matrix: str) -> bool:
        """Return whether the outputs of a matrix have a different order in the checkpoint than in memory."""
        return any(
            pattern.matches(module_of(".".join(name)).split("."))
            for scope, name in self._around(matrix)
            for pattern in scope.family.reordered
        )

    def in_memory(self, stored: str, spelling: Spelling = Spelling.TRANSFORMERS_5) -> tuple[Place, ...]:
        """Return the places of the checkpoint's tensor `stored` in the model in memory.

        Matrices whose outputs have a different order in the checkpoint are left out.
        """
        return tuple(
            Place(matrix.view, *self._holder(matrix, stored, spelling))
            for matrix in self.matrices(stored, spelling=Spelling.STORED)
            if matrix.name == stored or not self.is_reordered(matrix.name)
        )

    def on_disk(self, parameter: str, shape: Sequence[int]) -> tuple[Place, ...]:
        """Return the places of a parameter of the model in memory in the checkpoint.

        Parts that the checkpoint lacks are left out, and so are matrices whose outputs have a different order there.
        """
        stored = self.tensors.get(parameter)
        if stored is not None and tuple(stored.shape) == tuple(shape):
            return (Place(WHOLE, parameter, WHOLE),)
        places = self.holders
        return tuple(
            Place(matrix.view, *places[matrix.name])
            for matrix in self.matrices(parameter, shape)
            if matrix.name in places
        )

    def _holder(self, matrix: Matrix, stored: str, spelling: Spelling) -> tuple[str, View]:
        """Return the parameter in memory that holds a matrix of the tensor `stored`, and the part of it."""
        name = tuple(matrix.name.split("."))
        shape = self._shape_of(matrix.view, stored)
        for scope, _ in self._tables(name):
            for packing in scope.family.packed:
                held = packing.holder(name, shape, scope.config, spelling)
                if held is not None:
                    return self.spelled(held.name, spelling), held.view
        transposed = matrix.view.transposed if matrix.view.expert is None else False
        return self.spelled(matrix.name, spelling), View(transposed=transposed)

    def _shape_of(self, view: View, stored: str) -> tuple[int, ...]:
        """Return the shape, outputs first, of a view of a tensor."""
        return view.shape_in(self.tensors[stored].shape) if stored in self.tensors else ()

    @cached_property
    def holders(self) -> Mapping[str, tuple[str, View]]:
        """The tensor of the checkpoint that holds each matrix, and the part of it, by the matrix's name (`matrices`).

        Matrices whose outputs have a different order in the checkpoint are left out.
        """
        return {
            matrix.name: (name, matrix.view)
            for name in self.tensors
            for matrix in self.matrices(name, spelling=Spelling.STORED)
            if matrix.name == name or not self.is_reordered(matrix.name)
        }

    @cached_property
    def _canonical(self) -> dict[str, str]:
        return {}

    @cached_property
    def _roles(self) -> dict[tuple[str, int | None], Role]:
        return {}

    def _tables(self, name: tuple[str, ...]) -> Iterator[tuple[Scope, tuple[str, ...]]]:
        """Yield the tables of each model that a parameter belongs to and its name there: innermost first, generic last."""
        yield from self.scope.around(name)
        yield Scope(generic(), self.config, ()), name

    def _around(self, parameter: str) -> Iterator[tuple[Scope, tuple[str, ...]]]:
        return self.scope.around(tuple(template(self.canonical(parameter), self.scope.literals).split(".")))

    def _role(self, canonical: str, dimensions: int | None) -> Role:
        around = [(scope, ".".join(name)) for scope, name in self.scope.around(tuple(canonical.split(".")))]
        rows = [(scope.family.roles, name) for scope, name in around] + [(generic().roles, name) for _, name in around]
        for roles, name in rows:
            module = module_of(name).split(".")
            for pattern, role in roles:
                if pattern.matches(module) and (dimensions is None or role.fits(dimensions)):
                    return role
        if module_of(canonical) == canonical:
            return Role.OTHER
        return BY_DIMENSIONS.get(2 if dimensions is None else dimensions, Role.OTHER)

    def _packings(self, name: tuple[str, ...]) -> Iterator[tuple[Packing, tuple[str, ...], Mapping[str, Any]]]:
        """Yield each packing that a parameter may have, with the prefix of its name and the configuration of its sizes."""
        for scope, _ in self._tables(name):
            for packing in scope.family.packed:
                before = packing.prefix(name)
                if before is not None:
                    yield packing, before, scope.config

    def _partners(self, canonical: str) -> Iterator[str]:
        name = tuple(canonical.split("."))
        for scope, inside in self._tables(name):
            before = name[: len(name) - len(inside)]
            for tie in scope.family.tied:
                group = [".".join((*before, *other)) for other in tie.group(inside)]
                if group and (tie.always or self.ties_embeddings) and group[0] in self._names:
                    yield from group
        if self.ties_embeddings:
            yield from self._head_ties.get(canonical, ())

    @cached_property
    def _head_ties(self) -> dict[str, set[str]]:
        """The input embeddings of each output head, and the reverse: those of the innermost model that has both."""
        tokens, heads = (set(map(self.canonical, self.weights(role))) for role in (Role.TOKENS, Role.HEAD))
        found: dict[str, set[str]] = {}
        for head in heads:
            common = {name: _common(head, name) for name in tokens}
            for name in tokens:
                if common[name] == max(common.values()):
                    found.setdefault(head, set()).add(name)
                    found.setdefault(name, set()).add(head)
        return found

    @cached_property
    def _names(self) -> frozenset[str]:
        """The canonical names of the tensors."""
        return frozenset(map(self.canonical, self.tensors))


def architecture_of(config: Mapping[str, Any], tensors: Mapping[str, Shaped] | None = None) -> Architecture:
    """Return the architecture of a model with this ``config.json`` and these tensors.

    Raises:
        LoratoolError: the table of its family cannot be read.
    """
    return Architecture(Scope.of(config), tensors or {})


@cache
def any_model() -> Architecture:
    """Return the facts that hold for every model, without a configuration or tensors."""
    return architecture_of({})


def module_of(parameter: str) -> str:
    """Return the name of the module that a weight or a bias belongs to. Any other parameter's name is returned unchanged."""
    return parameter.removesuffix(".weight") if parameter.endswith(".weight") else parameter.removesuffix(".bias")


def _common(first: str, second: str) -> int:
    """Return the number of leading components that two names share."""
    pairs = enumerate(zip(first.split("."), second.split("."), strict=False))
    return next((count for count, (one, other) in pairs if one != other), 0)


def _has_end(module: str, ends: Collection[str], known: dict[str, bool]) -> bool:
    found = known.get(module)
    if found is None:
        found = known[module] = any(component_fits(template(module), end) for end in ends)
    return found
