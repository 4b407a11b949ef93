"""Rows of embeddings that an adapter of any kind trains with ``trainable_token_indices``, as PEFT 0.21 saves them.

``X.token_adapter.trainable_tokens_delta``, (tokens, width), holds the new rows of module X, not differences; the configuration
has their numbers: a list for the input embedding, or a list for each module by the end of its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.feature_beside import FeatureBeside
from loratool.formats.loadable import whole
from loratool.formats.tensor_keys import PREFIX
from loratool.updates import Update
from loratool.updates.token_rows import KIND, TokenRows

SETTING: Final = "trainable_token_indices"
ROWS: Final = "trainable_tokens_delta"
MOST_TOKENS: Final = 1 << 31
_ROWS: Final = re.compile(rf"(?:base_model\.model\.)?(?P<module>.+)\.token_adapter\.{ROWS}(?:\.(?P<adapter>[^.]+))?")


def rows_update(info: TensorInfo, listed: object, setting: str, source: str, *, kind: str = KIND) -> TokenRows:
    """Return the update of one module.

    Raises:
        AdapterError: `listed`, the value of `setting`, is not a list of different row numbers, one for each row of the tensor.
    """
    numbers = whole(listed)
    if (
        not isinstance(numbers, list)
        or not numbers
        or not all(type(n) is int and 0 <= n < MOST_TOKENS for n in numbers)
    ):
        raise AdapterError(
            f"{quoted(setting)} in {quoted(source)} is {quoted(listed, 40)} and must be a list of row numbers, each at least 0"
        )
    repeated = next((number for number, count in Counter(numbers).items() if count > 1), None)
    if repeated is not None:
        raise AdapterError(
            f"{quoted(setting)} in {quoted(source)} lists the row {repeated} twice, and only one of them can be kept; train it "
            "with each row once"
        )
    if len(info.shape) != 2 or info.shape[0] != len(numbers) or 0 in info.shape:
        raise AdapterError(
            f"{quoted(info.name)} in {quoted(source)} has shape {list(info.shape)}, and {setting} lists {len(numbers)} rows; the "
            "file is incomplete, or the configuration is another's"
        )
    return TokenRows(info, tuple(numbers), kind)


def _changes(rows: Mapping[str, TensorInfo], adapter: Adapter) -> dict[str, Update]:
    """Return the update of each module.

    Raises:
        AdapterError: the configuration contradicts the tensors.
    """
    stated: Any = adapter.config.get(SETTING)
    if stated is None and rows:
        raise AdapterError(
            f"{quoted(adapter.name)} holds rows of tokens ({quoted(next(iter(rows)))}), and its configuration does not say which "
            f"({SETTING}); add it, or save the adapter again"
        )
    listed = stated if isinstance(stated, dict) else dict.fromkeys(rows or ("an embedding",), stated)
    if stated is None:
        return {}
    if not isinstance(stated, dict) and len(rows) > 1:
        raise AdapterError(
            f"{SETTING} in {quoted(adapter.name)} lists rows of one embedding, and its file holds those of {len(rows)}; give a "
            "list for each of them"
        )
    found = {module: numbers for module in rows for name, numbers in listed.items() if module.endswith(str(name))}
    for module in sorted(rows.keys() - found.keys()):
        raise AdapterError(
            f"{quoted(adapter.name)} holds rows of {quoted(module)}, and {SETTING} lists none of it; correct it, or save the "
            "adapter again"
        )
    for name, numbers in listed.items():
        # PEFT saves one of several modules that are tied to each other and have the same rows.
        if not any(module.endswith(str(name)) for module in rows) and numbers not in found.values():
            raise AdapterError(
                f"{SETTING} in {quoted(adapter.name)} lists rows of {quoted(name, 60)}, which its file lacks; the file is "
                "incomplete"
            )
    return {
        f"{module}.weight": rows_update(info, found[module], SETTING, adapter.name) for module, info in rows.items()
    }


FEATURE: Final = FeatureBeside(_ROWS, _changes, lambda module, letter: f"{PREFIX}{module}.token_adapter.{ROWS}")
