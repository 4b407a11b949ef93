"""The family of an adapter as a tree in a terminal: its ancestors above it, its descendants below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from loratool.cli.rendering import cells_of, percent

if TYPE_CHECKING:
    from registry import AdapterRecord, LineageRecord

MOST_ENTRIES: Final = 40
MOST_NAMES: Final = 3
LEAST_TEXT: Final = 24
"""Cells of a line reserved for its text, however deep the family is."""

FIGURES: Final = ("rank", "scaling", "energy", "error", "budget", "as", "density")
"""The recorded details of an operation to show, by their names."""

Node = int | tuple[str, str | None]
"""An adapter: its row id in the catalogue, or without one, its name and sha256."""


def family_tree(record: AdapterRecord, edges: Sequence[LineageRecord], width: int) -> str:
    """Return the lines of the tree, starting with adapters without known parents; empty for an adapter without a family.

    An adapter with several parents stands below the first, and its line names the others. Lines are wrapped to `width` cells
    within their branches.
    """
    entries = list(_Family(record.id, edges).entries())
    more = len(entries) - MOST_ENTRIES
    lines = [line for entry in entries[:MOST_ENTRIES] for line in entry.lines(width)]
    return "\n".join([*lines, *([f"and {more:,} more"] if more > 0 else [])])


@dataclass(frozen=True, slots=True)
class _Entry:
    """One adapter in the tree: the prefix of its first line, the prefix of its further lines, and its text."""

    branch: str
    stem: str
    text: str

    def lines(self, width: int) -> Iterator[str]:
        """Yield the lines, wrapped between words. Of a prefix that leaves too little room, only the end is shown."""
        branch, stem = (_end_of(each, width - LEAST_TEXT) for each in (self.branch, self.stem))
        before, line = branch, ""
        for word in self.text.split(" "):
            longer = f"{line} {word}" if line else word
            if line and cells_of(before + longer) > width:
                yield (before + line).rstrip()
                before, line = stem, word
            else:
                line = longer
        yield (before + line).rstrip()


def _end_of(branches: str, cells: int) -> str:
    """Return the last `cells` cells of a prefix, with a mark if it was cut."""
    return branches if len(branches) <= cells else f"⋯{branches[1 - cells :]}"


@dataclass
class _Family:
    """The edges around the adapter `this`: first those to its ancestors, nearest first, then those to its descendants."""

    this: int
    edges: Sequence[LineageRecord]
    drawn: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.children: dict[Node, list[LineageRecord]] = {}
        self.parents: dict[int, list[LineageRecord]] = {}
        for edge in self.edges:
            self.children.setdefault(_parent(edge), []).append(edge)
            self.parents.setdefault(edge.child_id, []).append(edge)

    def entries(self) -> Iterator[_Entry]:
        for root in self._roots():
            edges = self.children[root]
            # A root whose children all stand below other parents is named on their lines.
            if root == self.this or any(edge.child_id not in self.drawn for edge in edges):
                yield _Entry("", "│  ", self._named(edges[0].parent, root))
                yield from self._below(root)

    def _roots(self) -> list[Node]:
        """Return the adapters without known parents, those of the earliest generation first."""
        generations: dict[Node, int] = {self.this: 0}
        for edge in self.edges:
            generations.setdefault(_parent(edge), generations.get(edge.child_id, 0) + 1)
        return sorted((node for node in self.children if node not in self.parents), key=lambda root: -generations[root])

    def _below(self, root: Node) -> Iterator[_Entry]:
        """Yield all descendants of `root`. A stack replaces recursion, since a family may be deep."""
        waiting = self._siblings(root, "")
        while waiting:
            edge, indent, last = waiting.pop()
            branch, below = f"{indent}{'└' if last else '├'}─ ", f"{indent}{' ' if last else '│'}  "
            name = self._named(edge.child, edge.child_id)
            if edge.child_id in self.drawn:
                yield _Entry(branch, f"{below}   ", f"{name}  (above)")
                continue
            self.drawn.add(edge.child_id)
            stem = f"{below}{'│' if self.children.get(edge.child_id) else ' '}  "
            yield _Entry(branch, stem, f"{name}  {_operation(edge)}{self._others(edge)}")
            waiting += self._siblings(edge.child_id, below)

    def _siblings(self, parent: Node, indent: str) -> list[tuple[LineageRecord, str, bool]]:
        """Return the edges to the children of `parent`, last first, each with its indent and whether it is the last."""
        edges = self.children.get(parent, [])
        return [(edge, indent, edge is edges[-1]) for edge in reversed(edges)]

    def _others(self, edge: LineageRecord) -> str:
        """Return the other parents of an adapter, as in ``, with terse@1``."""
        others = [other for other in self.parents[edge.child_id] if _parent(other) != _parent(edge)]
        weights = [_weight(other) for other in others]
        names = [
            other.parent if weight == 1 else f"{weight:g} x {other.parent}"
            for other, weight in zip(others, weights, strict=True)
        ]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return f", with {', '.join(names[:MOST_NAMES])}{more}" if names else ""

    def _named(self, name: str, node: Node) -> str:
        return f"{name} (this)" if node == self.this else name


def _parent(edge: LineageRecord) -> Node:
    return (edge.parent, edge.parent_sha256) if edge.parent_id is None else edge.parent_id


def _operation(edge: LineageRecord) -> str:
    """Return the operation with its details, such as ``combine svd, rank 4, lost 24.9%``."""
    details: Mapping[str, Any] = edge.details or {}
    method, lost = details.get("method"), details.get("lost")
    parts = [f"{edge.operation} {method}" if isinstance(method, str) else edge.operation]
    parts += [f"weight {_weight(edge):g}"] if _weight(edge) != 1 else []
    parts += [f"{key} {_number(details[key])}" for key in FIGURES if key in details]
    return ", ".join([*parts, *([f"lost {percent(lost, 1)}"] if isinstance(lost, float) else [])])


def _weight(edge: LineageRecord) -> float:
    """Return the weight of the parent in a combination; otherwise 1."""
    recorded = (edge.details or {}).get("weights")
    for each in recorded if isinstance(recorded, list) else ():
        if isinstance(each, dict) and each.get("sha256") == edge.parent_sha256:
            weight = each.get("weight")
            return float(weight) if isinstance(weight, int | float) else 1.0
    return 1.0


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
