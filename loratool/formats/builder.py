"""How adapters of one kind are made of tensors under PEFT's names, and their tensors named again.

A kind that loratool computes has a `Builder` in its file, and a row in `formats.builders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratool.checkpoint.header import TensorInfo
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha
from loratool.formats.lora_config import LoraConfig
from loratool.updates import Update

Factors = Mapping[str, Mapping[str, TensorInfo]]
"""The tensors of each module by the letters of the kind's paper."""


@dataclass(frozen=True, slots=True)
class Builder:
    """One kind of adapter.

    Attributes:
        read: the adapter of files that hold nothing else, for an alpha that the user gives or None.
        parse: its configuration, checked; the file's name is for messages.
        updates: the update of each module, from its tensors and its configuration.
        key: the name that PEFT gives to a tensor of a module, by its letter.
    """

    read: Callable[[AdapterFiles, Alpha | None], Adapter]
    parse: Callable[[Mapping[str, Any], str], LoraConfig]
    updates: Callable[[Factors, LoraConfig], dict[str, Update]]
    key: Callable[[str, str], str]
