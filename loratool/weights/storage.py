"""What a storage is: a row of the table in `loratool.weights.storages`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from loratool.checkpoint.header import TensorInfo
from loratool.weights.stored import StoredWeight


class Model(Protocol):
    """What storages look at: the tensors of a model by name, and its ``config.json``."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Storage:
    """A way to store parameters.

    Attributes:
        names: what `StoredWeight.storage` says of its parameters.
        title: what people call it.
        claim: the parameter of a name, or None where it is not stored so. The tensors decide, the configuration confirms.
            Raises CheckpointError where the tensors of such a parameter are missing, damaged, or contradict one another.
        parameter_of: the parameter that a tensor belongs to, judged by its name alone; None where no tensor of this storage
            is called so. A dense tensor's is its own.
        describes: what people call the storage of a model that has this ``quantization_config``; None where it is another.
        tags: what the Hub calls models with such parameters.
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
        title: what people call it.
        ends: how names of tensors end that no other storage has.
        describes: whether a ``quantization_config`` is that of a model stored so, where its method does not say.
    """

    title: str
    ends: tuple[str, ...]
    describes: Callable[[Mapping[str, Any]], bool] = lambda config: False
