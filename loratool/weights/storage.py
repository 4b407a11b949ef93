"""The definition of a storage: a row of the table in `loratool.weights.storages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loratool.checkpoint.header import TensorInfo
from loratool.weights.stored import StoredWeight


class Model(Protocol):
    """A model as storages and plans see it, on disk or in memory: its tensors by name, and its ``config.json``."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Storage:
    """A way to store parameters.

    Attributes:
        names: the values of `StoredWeight.storage` for its parameters.
        title: its name in messages.
        claim: returns the parameter of a name, or None if it is stored differently. The tensors decide; the
            configuration adds details such as the size of tiles. It raises CheckpointError if tensors of the parameter are
            missing, damaged or contradictory.
        parameter_of: returns the parameter that a tensor belongs to, by the tensor's name alone, or None if no tensor of this
            storage has such a name. A dense tensor belongs to the parameter of its own name.
        describes: returns the title for a model with this ``quantization_config``, or None if it is of another storage.
        tags: the Hub's tags of models with such parameters.
    """

    names: tuple[str, ...]
    title: str
    claim: Callable[[Model, str], StoredWeight | None]
    parameter_of: Callable[[str], str | None]
    describes: Callable[[Mapping[str, Any]], str | None]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OtherStorage:
    """A way to store parameters that loratool neither reads nor writes.

    Attributes:
        title: its name in messages.
        ends: suffixes of tensor names that no other storage has.
        describes: returns whether a ``quantization_config`` is of this storage, if its method alone does not determine that.
    """

    title: str
    ends: tuple[str, ...]
    describes: Callable[[Mapping[str, Any]], bool] = lambda config: False
