"""What a PEFT adapter of any kind may hold beside its factors, as one row of `formats.beside`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.updates import Update


@dataclass(frozen=True, slots=True)
class FeatureBeside:
    """One feature.

    Attributes:
        pattern: matches the names of its tensors, with the group ``module``.
        changes: returns the update of each parameter, from its tensors by module and the adapter that has only factors.
        key: returns PEFT's name of a module's tensor, given its letter.
    """

    pattern: re.Pattern[str]
    changes: Callable[[Mapping[str, TensorInfo], Adapter], Mapping[str, Update]]
    key: Callable[[str, str], str]

    def split(
        self, tensors: Mapping[str, TensorInfo], source: str
    ) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
        """Return its tensors by module, and all other tensors by name.

        Raises:
            AdapterError: a module has two of them.
        """
        own: dict[str, TensorInfo] = {}
        rest = {}
        for name, info in sorted(tensors.items()):
            match = self.pattern.fullmatch(name)
            if match is None:
                rest[name] = info
            elif match["module"] in own:
                raise AdapterError(
                    f"{quoted(source)} holds {quoted(own[match['module']].name)} and {quoted(name)}, two tensors for one; save "
                    "each adapter to a file of its own"
                )
            else:
                own[match["module"]] = info
        return own, rest
