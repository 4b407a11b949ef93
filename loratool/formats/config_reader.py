"""Typed access to the values of a configuration that may come from a stranger."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratool.errors import AdapterError, quoted
from loratool.formats.loadable import whole


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to a configuration's values; each method raises AdapterError for a value of another type."""

    config: Mapping[str, Any]
    source: str

    def positive_int(self, key: str, value: object = None) -> int:
        value = self.config.get(key) if value is None else value
        value = whole(value)
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number of at least 1")
        return value

    def number(self, key: str, value: object = None) -> float:
        value = self.config.get(key) if value is None else value
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
            raise self._wrong(key, value, "a number")
        return value  # type: ignore[return-value]

    def flag(self, key: str) -> bool:
        value = self.config.get(key) or False
        if not isinstance(value, bool) and value != 1:
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def mapping(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return list(value.items())

    def names(self, key: str, default: tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        value = self.config.get(key)
        if value is None:
            return default
        return value if isinstance(value, str) else self.strings(key)

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of names")
        return tuple(value)

    def layers(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        value = [] if value is None else value if isinstance(value, list) else [value]
        layers = [whole(item) for item in value]
        if not all(type(layer) is int for layer in layers):
            raise self._wrong(key, self.config.get(key), "a list of layer numbers")
        return tuple(layers)  # type: ignore[arg-type]

    def _wrong(self, key: str, value: object, expected: str) -> AdapterError:
        text = "the text " if isinstance(value, str) else ""
        return AdapterError(
            f"{quoted(key)} in {quoted(self.source)} is {text}{quoted(value, 40)} and must be {expected}"
        )
