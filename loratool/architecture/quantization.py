"""Which linear layers of a family transformers quantizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loratool.architecture.pattern import NUMBER, Pattern, is_number


@dataclass(frozen=True, slots=True)
class Quantization:
    """Where transformers departs from quantizing every linear layer except the output head.

    Attributes:
        dense: modules that stay dense, with all modules inside them.
        last: modules that may come last in a model, by the last one of their names that the model has: the first row that a
            module matches decides, and with ``#`` the greatest number.
        heads: output heads that are quantized like any other linear layer.
    """

    dense: tuple[Pattern, ...] = ()
    last: tuple[Pattern, ...] = ()
    heads: tuple[Pattern, ...] = ()

    def followed_by(self, other: Quantization) -> Quantization:
        return Quantization(self.dense + other.dense, self.last + other.last, self.heads + other.heads)

    def stays_dense(self, module: Sequence[str]) -> bool:
        """Return whether `dense` has a module or one around it, given the components of its name with ``#`` for numbers."""
        return any(pattern.matches(module[:end]) for pattern in self.dense for end in range(1, len(module) + 1))

    def last_of(self, modules: Iterable[str], name: Callable[[str], str]) -> str | None:
        """Return the one of `modules` that comes last, if a row says so. `name` gives the name that the rows are about."""
        named = {module: name(module).split(".") for module in modules} if self.last else {}
        for pattern in self.last:
            found = [module for module, parts in named.items() if pattern.matches(_template(parts))]
            if found:
                return max(found, key=lambda module: _numbers(named[module]))
        return None


def _template(parts: Sequence[str]) -> list[str]:
    return [NUMBER if is_number(part) else part for part in parts]


def _numbers(parts: Sequence[str]) -> list[int]:
    return [int(part) for part in parts if is_number(part)]
