"""The matrices that transformers stores in 4 bits when it quantizes a model: the weights of linear layers.

transformers replaces the modules of a built model that are an nn.Linear or a Conv1D, except the output head, modules that share
their weight with another one, the last module (``get_keys_to_not_convert``), and those that the model's class keeps in fp32.
Here the names of the tensors and the tables decide, so that no model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from loratool.architecture.architecture import Architecture, module_of
from loratool.architecture.pattern import template
from loratool.architecture.quantization import Quantization
from loratool.architecture.roles import Role
from loratool.architecture.tables import generic

WEIGHT: Final = ".weight"
_EXPERTS: Final = "experts"


def quantizable_weights(architecture: Architecture) -> tuple[str, ...]:
    """Return the names of the tensors that transformers stores in 4 bits, sorted."""
    return tuple(filter(_Model(architecture).is_quantizable, sorted(architecture.tensors)))


def skipped_modules(architecture: Architecture) -> list[str] | None:
    """Return ``llm_int8_skip_modules`` for a quantization_config; None if transformers' default is the same.

    Experts and their router are not linear layers in transformers 5. Earlier versions treat them as linear unless they are
    named, and then all modules that stay dense must be named.
    """
    roles = {name: architecture.role(name) for name in architecture.tensors if _is_weight(name)}
    routed = {module_of(name) for name, role in roles.items() if role in (Role.EXPERTS, Role.ROUTER)}
    if not routed:
        return None
    heads = {module_of(name) for name, role in roles.items() if role is Role.HEAD}
    last = _Model(architecture).last
    return sorted({*map(_container, routed), "lm_head", *heads, *([last] if last else [])})


@dataclass(frozen=True)
class _Model:
    architecture: Architecture

    def is_quantizable(self, name: str) -> bool:
        tensors = self.architecture.tensors
        if not _is_weight(name) or len(tensors[name].shape) != 2 or 0 in tensors[name].shape:
            return False
        module, role = module_of(name), self.architecture.role(name)
        if role is Role.HEAD:
            return self._is_quantized_head(name)
        if role not in (Role.LINEAR, Role.CLASSIFIER) or self._is_of_attention(module) or module == self.last:
            return False
        return not self._stays_dense(name) and not self.architecture.tied(name)

    @cached_property
    def last(self) -> str | None:
        """The module that stays dense because it comes last.

        transformers finds it by the name of the last parameter. If that is a bias, the module is quantized.
        """
        tensors = self.architecture.tensors
        rows = self.architecture.scope.family.quantization.followed_by(generic().quantization)
        last = rows.last_of(map(module_of, filter(_is_weight, tensors)), self.architecture.canonical)
        return None if f"{last}.bias" in tensors else last

    def _is_quantized_head(self, name: str) -> bool:
        return any(pattern.matches(module) for rows, module in self._rows(name) for pattern in rows.heads)

    def _stays_dense(self, name: str) -> bool:
        return any(rows.stays_dense(module) for rows, module in self._rows(name))

    def _rows(self, name: str) -> Iterator[tuple[Quantization, list[str]]]:
        """Yield the rows about the models that a weight belongs to, and the components of its module's name there."""
        architecture = self.architecture
        canonical = template(architecture.canonical(name), architecture.scope.literals)
        for scope, inside in architecture.scope.around(tuple(module_of(canonical).split("."))):
            yield scope.family.quantization, list(inside)

    def _is_of_attention(self, module: str) -> bool:
        """Return whether a module is the output projection of an nn.MultiheadAttention, which is a class of its own."""
        before, _, end = module.rpartition(".")
        return end == "out_proj" and f"{before}.in_proj_weight" in self.architecture.tensors


def _is_weight(name: str) -> bool:
    return name.endswith(WEIGHT)


def _container(module: str) -> str:
    """Return the module that contains all experts if `module` is one of them, or else `module`."""
    before, found, _ = module.rpartition(f".{_EXPERTS}.")
    return f"{before}.{_EXPERTS}" if found else module
