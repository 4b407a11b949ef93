"""How adapters of one kind are built from tensors with PEFT's names, and how their tensors are named when written.

A kind that loratool computes has a `Builder` in its file, and a row in `formats.builders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from loratool.checkpoint.header import TensorInfo
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha
from loratool.formats.module_targets import ModuleTargets
from loratool.updates import Update

Settings = TypeVar("Settings", bound=ModuleTargets)

Factors = Mapping[str, Mapping[str, TensorInfo]]
"""The tensors of each module by the letters in the kind's paper; those that all modules share have the module ``""``."""


@dataclass(frozen=True, slots=True)
class Builder(Generic[Settings]):
    """One kind of adapter.

    Attributes:
        read: reads an adapter from files that contain only this kind, given the user's alpha or None.
        parse: parses and checks a configuration; the file's name is for messages.
        updates: returns the update of each module, from its tensors and the configuration.
        key: returns PEFT's name of a module's tensor, given its letter.
    """

    read: Callable[[AdapterFiles, Alpha | None], Adapter]
    parse: Callable[[Mapping[str, Any], str], Settings]
    updates: Callable[[Factors, Settings], dict[str, Update]]
    key: Callable[[str, str], str]
