"""The settings that all of PEFT's types share: which modules an adapter changes, and how their weights are oriented.

The keys and their meaning are those of PEFT 0.21. A kind's own settings extend `ModuleTargets` in the kind's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import OF_PEFT
from loratool.formats.module_patterns import matches

ALL_LINEAR: Final = "all-linear"
MOST_DIGITS: Final = 9
"""Limit of the digits of a layer's number."""

_COMMON_KEYS: Final = """
    target_modules exclude_modules layers_to_transform layers_pattern modules_to_save task_type peft_type auto_mapping
    peft_version base_model_name_or_path revision inference_mode
"""
COMMON_KEYS: Final = frozenset(_COMMON_KEYS.split())
"""Keys that all types have; those not used here say what is saved whole or record the origin."""

FAN_IN: Final = "fan_in_fan_out"
"""Key of the types that can say that weights are stored as (in_features, out_features); others ignore it, as PEFT does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTargets:
    """The modules that an adapter of any kind changes. `source` is the file it came from, for messages."""

    source: str
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    fan_in_fan_out: bool
    unknown: tuple[str, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration of a type that has no settings of its own.

        Raises:
            UnsupportedError: it is of another type, or asks for a feature that loratool does not compute.
            AdapterError: a value is missing or impossible.
        """
        return cls(**target_fields(config, source))

    def targets(self, module: str) -> bool:
        """Return whether PEFT would adapt `module` (``peft.tuners.tuners_utils.check_target_module_exists``)."""
        if self._is_excluded(module):
            return False
        if self.target_modules is None or self.target_modules == ALL_LINEAR:
            return True
        if isinstance(self.target_modules, str):
            return matches(self.target_modules, module, self.source, whole=True) is not None
        if module in self.target_modules:
            return True
        return any(module.endswith(f".{name}") for name in self.target_modules) and self._is_chosen_layer(module)

    def _is_excluded(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return matches(self.exclude_modules, module, self.source, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.exclude_modules)

    def _is_chosen_layer(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            found = matches(pattern, module, self.source, whole=False)
            if found is not None:
                index = found["idx"] or ""
                if not index.isdecimal() or len(index) > MOST_DIGITS:
                    raise AdapterError(
                        f"{quoted(pattern)} in {quoted(self.source)} finds no layer number in {quoted(module)}; "
                        "correct layers_pattern"
                    )
                return int(index) in self.layers_to_transform
        return False


def targets_parser(own_keys: frozenset[str]) -> Callable[[Mapping[str, Any], str], ModuleTargets]:
    """Return the parser of a type that has targets and nothing else that changes numbers."""
    return lambda config, source: ModuleTargets(**target_fields(config, source, own_keys))


def target_fields(config: Mapping[str, Any], source: str, own_keys: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return the checked fields of `ModuleTargets`; `own_keys` are the keys that the type has beside `COMMON_KEYS`.

    Raises:
        AdapterError: a value is impossible.
    """
    read, known = ConfigReader(config, source), COMMON_KEYS | own_keys
    return {
        "source": source,
        "target_modules": read.names("target_modules", None),
        "exclude_modules": read.names("exclude_modules", ()) or (),
        "layers_to_transform": read.layers("layers_to_transform"),
        "layers_pattern": read.strings("layers_pattern"),
        "fan_in_fan_out": FAN_IN in known and read.flag(FAN_IN),
        "unknown": tuple(sorted(str(key) for key in config if key not in known)),
    }


def other_type(peft_type: object, source: str) -> UnsupportedError:
    """Return the error for a PEFT type that loratool does not compute."""
    row = OF_PEFT.get(peft_type) if isinstance(peft_type, str) else None
    if row is None:
        return UnsupportedError(
            f"{quoted(source)} is of the PEFT type {quoted(peft_type, 40)}, which this loratool does not know; upgrade "
            "loratool, or merge it with PEFT"
        )
    return UnsupportedError(f"{quoted(source)} is {row.title} ({row.peft_type}): {row.why_not}")
