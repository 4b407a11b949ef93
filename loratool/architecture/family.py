"""The table of a model family: one JSON file in the folder ``families``, read and checked.

All keys of a file are optional:

``about``
    A note for readers.
``models``
    The ``model_type`` of each configuration that the file covers.
``like``
    Other families, by the names of their files, whose entries follow its own.
``tie_word_embeddings``
    Whether the output head is tied to the input embedding if a configuration does not say.
``transposed``
    Patterns of linear layers that store their weight as (in_features, out_features).
``reordered``
    Patterns of linear layers whose outputs have a different order in the checkpoint than in memory.
``roles``
    Maps each role (`Role`) to patterns of the modules that have it, or of parameters that belong to no module of their own.
    The first pattern that matches a name decides.
``parts``
    Maps a key of the configuration that holds another configuration to the places of that model among the modules.
``stored``
    Maps names on disk to names in memory, for every version of transformers that converts them. Each entry replaces some
    components of a name once: anywhere in the name, or with ``^`` only at its beginning. Entries apply in their order.
``since_5``
    The same, for names that transformers 4 has in memory as they are on disk.
``legacy``
    The same, for names that only old checkpoints have.
``packed``
    Parameters that hold several matrices. Each entry has the ``parameter``, the names of its ``parts``, and their ``sizes``.
    ``interleaved``, ``transposed`` and ``packed_in`` are true, false, or a list of "stored", "transformers 4" and
    "transformers 5", the programs for which that holds. ``in_features`` or ``out_features`` is a key of the configuration
    that shows by the shape whether the matrices are transposed. See `Packing`.
``tied``
    ``parameters`` that share their values, and whether they do so ``always``. See `Tie`.
``reads``
    Maps an input of linear layers, such as ``attention input``, to patterns of the layers that read it.
``quantization``
    Where transformers departs from quantizing every linear layer except the output head. See `Quantization`.
``layers``
    The makeup of a layer, for counting parameters and memory without the weights. See `Layers`.
``same_part``
    Lists of names that programs give to the same part of a model.
``classes``
    ``generating``: words in the names of classes with an output head. ``headless``: words in the names of classes with
    another head instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loratool.architecture.layers import ARRANGEMENTS, HEAD_NORMS, Layers
from loratool.architecture.packing import Packing
from loratool.architecture.pattern import Pattern, PatternError, parse_components
from loratool.architecture.quantization import Quantization
from loratool.architecture.renaming import Renaming, Since, Spelling
from loratool.architecture.roles import Role
from loratool.architecture.ties import Tie
from loratool.errors import LoratoolError, quoted

MOST_ENTRIES: Final = 2000
"""The most entries in a list or a table."""


@dataclass(frozen=True, slots=True)
class Family:
    """The entries of one file, followed by those of the families in ``like``. The attributes are the file's keys."""

    name: str
    models: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    tie_word_embeddings: bool | None = None
    transposed: tuple[Pattern, ...] = ()
    reordered: tuple[Pattern, ...] = ()
    roles: tuple[tuple[Pattern, Role], ...] = ()
    renamings: tuple[Renaming, ...] = ()
    packed: tuple[Packing, ...] = ()
    tied: tuple[Tie, ...] = ()
    parts: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    reads: tuple[tuple[Pattern, str], ...] = ()
    quantization: Quantization = field(default_factory=Quantization)
    layers: Layers | None = None
    same_part: tuple[tuple[str, ...], ...] = ()
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def followed_by(self, other: Family) -> Family:
        """Return the entries of both families, with these first."""
        own_tie = self.tie_word_embeddings
        return Family(
            self.name,
            self.models,
            self.like,
            other.tie_word_embeddings if own_tie is None else own_tie,
            self.transposed + other.transposed,
            self.reordered + other.reordered,
            self.roles + other.roles,
            self.renamings + other.renamings,
            self.packed + other.packed,
            self.tied + other.tied,
            {**other.parts, **self.parts},
            self.reads + other.reads,
            self.quantization.followed_by(other.quantization),
            self.layers or other.layers,
            self.same_part + other.same_part,
            {**other.classes, **self.classes},
        )

    @property
    def literals(self) -> frozenset[str]:
        """Numbers that are spelled out in its names, and so are not the number of any layer."""
        return frozenset[str]().union(*(renaming.literals for renaming in self.renamings))


def parse_family(content: Mapping[str, Any], name: str, source: str) -> Family:
    """Parse the content of a file. `source` names the file in errors.

    Raises:
        LoratoolError: a key is unknown, or its value is invalid.
    """
    table = _Table(content, "", source)
    family = Family(
        name,
        models=table.texts("models"),
        like=table.texts("like"),
        tie_word_embeddings=table.flag("tie_word_embeddings", None),
        transposed=tuple(table.parsed("transposed", Pattern.parse)),
        reordered=tuple(table.parsed("reordered", Pattern.parse)),
        roles=tuple(_roles(table)),
        renamings=tuple(renaming for since in Since for renaming in _renamings(table, since)),
        packed=tuple(map(_packing, table.tables("packed"))),
        tied=tuple(map(_tie, table.tables("tied"))),
        parts=_parts(table),
        reads=tuple(_reads(table)),
        quantization=_quantization(table.table("quantization")),
        layers=_layers(table),
        same_part=_same_part(table),
        classes=_classes(table),
    )
    table.value("about")
    table.refuse_others()
    return family


@dataclass(frozen=True, slots=True)
class _Table:
    """An object in the file, and the keys that were read from it. Each method raises LoratoolError for an invalid value."""

    content: Mapping[str, Any]
    place: str
    source: str
    asked: set[str] = field(default_factory=set)

    def refuse_others(self) -> None:
        """Raise LoratoolError for a key that was not read."""
        for key in self.content:
            if key not in self.asked:
                raise self.wrong(key, f"no such key; the keys are {', '.join(sorted(self.asked))}")

    def wrong(self, key: str, reason: str) -> LoratoolError:
        return LoratoolError(f"{quoted(self.place + key)} in {quoted(self.source)} is wrong: {reason}")

    def value(self, key: str) -> Any:
        self.asked.add(key)
        return self.content.get(key)

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, "it must be a text")
        return value

    def optional(self, key: str) -> str | None:
        return None if self.value(key) is None else self.text(key)

    def flag(self, key: str, default: bool | None) -> bool | None:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "it must be true or false")
        return default if value is None else value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value(key)
        values = [] if value is None else value
        if not isinstance(values, list) or not all(isinstance(each, str) and each for each in values):
            raise self.wrong(key, "it must be a list of texts")
        if len(values) > MOST_ENTRIES:
            raise self.wrong(key, f"it has more than {MOST_ENTRIES} entries")
        return tuple(values)

    def parsed(self, key: str, parse: Callable[[str], Pattern]) -> Iterator[Pattern]:
        for text in self.texts(key):
            try:
                yield parse(text)
            except PatternError as error:
                raise self.wrong(key, f"{quoted(text, 40)}: {error}") from None

    def table(self, key: str) -> _Table:
        value = self.value(key)
        content = {} if value is None else value
        if not isinstance(content, dict):
            raise self.wrong(key, "it must be an object")
        if len(content) > MOST_ENTRIES:
            raise self.wrong(key, f"it has more than {MOST_ENTRIES} entries")
        return _Table(content, f"{self.place}{key}.", self.source)

    def tables(self, key: str) -> list[_Table]:
        value = self.value(key)
        values = [] if value is None else value
        if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
            raise self.wrong(key, "it must be a list of objects")
        if len(values) > MOST_ENTRIES:
            raise self.wrong(key, f"it has more than {MOST_ENTRIES} entries")
        return [_Table(each, f"{self.place}{key}.", self.source) for each in values]

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = default if default is not None and self.value(key) is None else self.text(key)
        if value not in choices:
            raise self.wrong(key, f"it must be one of {', '.join(filter(None, choices))}")
        return value

    def whole(self, key: str, default: int) -> int:
        value = self.value(key)
        if value is not None and (type(value) is not int or value < 0):
            raise self.wrong(key, "it must be a whole number")
        return default if value is None else int(value)


def _roles(table: _Table) -> Iterator[tuple[Pattern, Role]]:
    roles = table.table("roles")
    for key in roles.content:
        role = next((role for role in Role if role.value == key), None)
        if role is None:
            raise roles.wrong(key, f"no such role; the roles are {', '.join(role.value for role in Role)}")
        for pattern in roles.parsed(key, Pattern.parse):
            yield pattern, role


def _reads(table: _Table) -> Iterator[tuple[Pattern, str]]:
    reads = table.table("reads")
    for what in reads.content:
        for pattern in reads.parsed(what, Pattern.parse):
            yield pattern, what


def _renamings(table: _Table, since: Since) -> Iterator[Renaming]:
    names = table.table(since.value)
    for old in names.content:
        new = names.value(old)
        if not isinstance(new, str):
            raise names.wrong(old, "it must be a text")
        try:
            yield Renaming.parse(old, new, since)
        except PatternError as error:
            raise names.wrong(old, str(error)) from None


def _packing(table: _Table) -> Packing:
    try:
        packing = Packing.parse(
            table.text("parameter"),
            table.texts("parts"),
            table.texts("sizes"),
            interleaved=_spellings(table, "interleaved", default=False),
            transposed=_spellings(table, "transposed", default=False),
            packed_in=_spellings(table, "packed_in", default=True),
            in_features=table.optional("in_features"),
            out_features=table.optional("out_features"),
        )
    except PatternError as error:
        raise table.wrong("parts", str(error)) from None
    table.refuse_others()
    return packing


def _spellings(table: _Table, key: str, *, default: bool) -> frozenset[Spelling]:
    value = table.value(key)
    if value is None or isinstance(value, bool):
        return frozenset(Spelling) if (default if value is None else value) else frozenset()
    known = {spelling.value: spelling for spelling in Spelling}
    texts = table.texts(key)
    if not all(text in known for text in texts):
        raise table.wrong(key, f"it must be true, false or a list of {', '.join(map(quoted, known))}")
    return frozenset(known[text] for text in texts)


def _tie(table: _Table) -> Tie:
    try:
        tie = Tie.parse(table.texts("parameters"), always=bool(table.flag("always", False)))
    except PatternError as error:
        raise table.wrong("parameters", str(error)) from None
    table.refuse_others()
    return tie


def _quantization(table: _Table) -> Quantization:
    dense, last, heads = (tuple(table.parsed(key, Pattern.parse)) for key in ("dense", "last", "heads"))
    table.refuse_others()
    return Quantization(dense, last, heads)


def _layers(table: _Table) -> Layers | None:
    if table.value("layers") is None:
        return None
    layers = table.table("layers")
    plain = Layers(layers.choice("like", ARRANGEMENTS))
    found = Layers(
        plain.like,
        layers.optional("activation") or plain.activation,
        layers.whole("norms", plain.norms),
        layers.choice("head_norms", HEAD_NORMS, plain.head_norms),
        bool(layers.flag("qkv_bias", plain.qkv_bias)),
        bool(layers.flag("fused", plain.fused)),
    )
    layers.refuse_others()
    return found


def _parts(table: _Table) -> dict[str, tuple[tuple[str, ...], ...]]:
    parts = table.table("parts")
    found = {}
    for key in parts.content:
        try:
            found[key] = tuple(parse_components(path)[0] for path in parts.texts(key))
        except PatternError as error:
            raise parts.wrong(key, str(error)) from None
    return found


def _same_part(table: _Table) -> tuple[tuple[str, ...], ...]:
    value = table.value("same_part") or []
    if not isinstance(value, list) or not all(isinstance(each, list) for each in value):
        raise table.wrong("same_part", "it must be a list of lists of texts")
    lists = _Table(dict(zip(map(str, range(len(value))), value, strict=True)), "same_part.", table.source)
    return tuple(lists.texts(key) for key in lists.content)


def _classes(table: _Table) -> dict[str, tuple[str, ...]]:
    classes = table.table("classes")
    found = {key: classes.texts(key) for key in ("generating", "headless")}
    classes.refuse_others()
    return {key: words for key, words in found.items() if words}
