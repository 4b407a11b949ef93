"""The table of features that PEFT adapters of any kind may hold beside their factors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats import lora_bias, token_rows
from loratool.formats.adapter import Adapter
from loratool.formats.feature_beside import FeatureBeside
from loratool.formats.lora_config import LORA_BIAS
from loratool.updates import Update
from loratool.updates.token_rows import KIND as TOKEN_ROWS

BESIDE: Final[Mapping[str, FeatureBeside]] = MappingProxyType({
    LORA_BIAS: lora_bias.FEATURE,
    TOKEN_ROWS: token_rows.FEATURE,
})  # fmt: skip
"""Every feature by the `kind` of its updates."""

Own = Mapping[str, Mapping[str, TensorInfo]]
"""The tensors of each feature, by module."""


def split_beside(tensors: Mapping[str, TensorInfo], source: str) -> tuple[Own, dict[str, TensorInfo]]:
    """Return the tensors of each feature, and all others by name.

    Raises:
        AdapterError: a feature has two tensors for one module.
    """
    found, rest = {}, dict(tensors)
    for name, feature in BESIDE.items():
        found[name], rest = feature.split(rest, source)
    return found, rest


def changes_beside(found: Own, adapter: Adapter) -> dict[str, Update]:
    """Return the updates of all features; `adapter` has only those of its factors.

    Raises:
        AdapterError: the configuration contradicts the tensors, or two updates change one parameter.
    """
    changes: dict[str, Update] = {}
    for name, feature in BESIDE.items():
        for parameter, update in feature.changes(found[name], adapter).items():
            if parameter in adapter.changes or parameter in changes:
                raise AdapterError(
                    f"{quoted(adapter.name)} changes {quoted(parameter)} twice, also by {update.kind}; train it without one of "
                    "them"
                )
            changes[parameter] = update
    return changes
