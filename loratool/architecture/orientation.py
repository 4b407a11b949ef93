"""The orientation of linear layers' weights: (out_features, in_features), or the transpose, as GPT-2's Conv1D stores them.

A Conv1D always has a bias, with one number per output. So a matrix without a bias is never transposed, and the size of the bias
decides for one that is not square. For a square matrix the tables decide, then its neighbours in the same layer, then the other
matrices of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratool.architecture.architecture import Architecture, module_of
from loratool.architecture.pattern import is_number


@dataclass(frozen=True)
class Orientation:
    """The orientation of a model's weights.

    Attributes:
        outputs: the numbers of outputs of matrices that are known from updates that land on them, besides those from biases.
    """

    architecture: Architecture
    outputs: Mapping[str, Collection[int]] = field(default_factory=dict)

    def transposed(self, weight: str) -> bool | None:
        """Return whether a matrix is stored as (in_features, out_features), or None if unknown, as for some square ones."""
        rows, columns = self.architecture.tensors[weight].shape
        if self._bias(weight) is None:
            return False
        if rows != columns:
            return self._known_outputs(weight) == {columns}
        if self.architecture.transposed(weight):
            return True
        return self._agreed.get(_layer(weight), self._agreed.get(""))

    @cached_property
    def _agreed(self) -> dict[str, bool]:
        """Whether matrices are transposed, by layer, and by ``""`` for the model, wherever those that are not square agree."""
        votes: dict[str, set[bool]] = {}
        for name, info in self.architecture.tensors.items():
            if len(info.shape) != 2 or info.shape[0] == info.shape[1] or not name.endswith(".weight"):
                continue
            outputs = self._known_outputs(name)
            layer = _layer(name) if len(outputs) == 1 and outputs <= set(info.shape) else ""
            for place in (layer, "") if layer else ():
                votes.setdefault(place, set()).add(outputs == {info.shape[1]})
        return {place: found == {True} for place, found in votes.items() if len(found) == 1}

    def _known_outputs(self, weight: str) -> set[int]:
        bias = self._bias(weight)
        return {*self.outputs.get(weight, ()), *(() if bias is None or len(bias) != 1 else bias)}

    def _bias(self, weight: str) -> tuple[int, ...] | None:
        """Return the shape of the bias of a weight's module, or None if it has no bias."""
        bias = self.architecture.tensors.get(f"{module_of(weight)}.bias")
        return None if bias is None else tuple(bias.shape)


def _layer(name: str) -> str:
    """Return the part of a name up to its first number, such as ``model.layers.3``, or an empty text if it has none."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if is_number(part)), None)
    return "" if number is None else ".".join(parts[: number + 1])
