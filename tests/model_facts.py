"""What transformers says of a model that it builds, to compare the tables of loratool.architecture with.

A model is built on the meta device: its modules, names, shapes and ties are there, its numbers are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    apply_converters,
    apply_renamings,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from loratool.architecture import Architecture, Role, Spelling, architecture_of, quantizable_weights
from loratool.architecture.pattern import template


def built(model_class: type[transformers.PreTrainedModel], config: transformers.PreTrainedConfig) -> Any:
    """Return a model without numbers, its weights tied."""
    with torch.device("meta"):
        model = model_class._from_config(config)
    model.tie_weights()
    return model


@dataclass(frozen=True)
class ModelFacts:
    """A model that transformers built, and what the tables say of it."""

    model: Any
    architecture: Architecture

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        tensors = {name: SimpleNamespace(shape=tuple(each.shape)) for name, _, each in _parameters(model)}
        return cls(model, architecture_of(model.config.to_dict(), tensors))

    def differences(self) -> dict[str, set[str]]:
        """Return in what the tables differ from the model: roles, orientation, names, packed parameters, ties, quantization."""
        found = {
            "roles": set(self.roles()),
            "orientation": set(self.orientation()),
            "names": set(self.names()),
            "matrices": set(self.matrices()),
            "ties": set(self.ties()),
            "quantization": set(self.quantization()),
        }
        return {subject: lines for subject, lines in found.items() if lines}

    def roles(self) -> Iterator[str]:
        """Yield parameters whose role is another, as far as the type of a module tells it."""
        tokens, head = self._named("get_input_embeddings"), self._named("get_output_embeddings")
        for name, module, _ in _parameters(self.model):
            expected = _role_by_type(
                module, is_tokens=name.rpartition(".")[0] == tokens, is_head=name.rpartition(".")[0] == head
            )
            role = self.architecture.role(name)
            if expected is not None and role not in _accepted(expected):
                yield f"{template(name)} is {role.value} and not {expected.value}"

    def orientation(self) -> Iterator[str]:
        """Yield matrices of linear layers and experts that the tables hold to lie the other way."""
        for name, module, parameter in _parameters(self.model):
            if isinstance(module, Conv1D | nn.Linear) and parameter.dim() == 2:
                if bool(self.architecture.transposed(name)) != isinstance(module, Conv1D):
                    yield f"{template(name)} lies the other way"
            elif hasattr(module, "is_transposed") and hasattr(module, "is_concatenated") and parameter.dim() == 3:
                views = [matrix.view for matrix in self.architecture.matrices(name)[:2]]
                if any(view.transposed != module.is_transposed for view in views):
                    yield f"{template(name)} lies the other way"
                if "gate_up" in name and (views[0].outputs.step is None) != module.is_concatenated:
                    yield f"{template(name)} has its rows in another order"

    def names(self) -> Iterator[str]:
        """Yield names on disk, and in memory, that become another name in memory or on disk."""
        written, original = self._stored_names(PrefixChange), self._stored_names()
        for memory, stored in (*written.items(), *original.items()):
            if self._same(self.architecture.canonical(stored)) != self._same(memory):
                yield f"{template(stored)} becomes {template(self.architecture.canonical(stored))} and not {template(memory)}"
        for memory in self.architecture.tensors:
            if self._same(self.architecture.canonical(memory)) != self._same(memory):
                yield f"{template(memory)}, in memory, becomes {template(self.architecture.canonical(memory))}"
            elif memory in written and self.architecture.canonical(memory) == memory:
                back = self.architecture.spelled(memory, Spelling.STORED)
                if self._same(back) not in (self._same(written[memory]), self._same(original[memory])):
                    yield f"{template(memory)} is stored as {template(back)} and not {template(original[memory])}"

    def matrices(self) -> Iterator[str]:
        """Yield matrices that only the packed parameters in memory, or only the checkpoint, are known to hold."""
        packed = [name for name in self.architecture.tensors if name not in self._stored_names()]
        state = self.model.state_dict()
        in_memory = {matrix.name for name in packed for matrix in self.architecture.matrices(name, state[name].shape)}
        reverted = revert_weight_conversion(self.model, {name: state[name] for name in packed})
        stored = {
            matrix.name
            for name, tensor in reverted.items()
            for matrix in self.architecture.matrices(name, tensor.shape, Spelling.STORED)
        }
        yield from (f"{template(name)} is in memory alone" for name in in_memory - stored)
        yield from (f"{template(name)} is stored alone" for name in stored - in_memory)

    def ties(self) -> Iterator[str]:
        """Yield parameters that share their values with others than the tables say."""
        owners: dict[int, set[str]] = {}
        for name, _, parameter in _parameters(self.model):
            owners.setdefault(id(parameter), set()).add(name)
        shared = {name: names for names in owners.values() for name in names}
        for name, names in shared.items():
            said = {other for other in self.architecture.tied(name) if other in shared}
            if said != names - {name}:
                yield f"{template(name)} is tied to {sorted(map(template, names - {name}))}, not to {sorted(map(template, said))}"

    def quantization(self) -> Iterator[str]:
        """Yield weights that transformers stores in 4 bits and the tables do not, or the reverse, by either name."""
        skipped = [*get_keys_to_not_convert(self.model), *(self.model._keep_in_fp32_modules or [])]
        expected = {
            f"{path}.weight"
            for path, module in self.model.named_modules()
            if (isinstance(module, Conv1D) or type(module) is nn.Linear)
            and should_convert_module(path, skipped)
            and 0 not in module.weight.shape
        }
        state = self.model.state_dict()
        for names in ({name: name for name in state}, self._stored_names()):
            tensors = {names[name]: SimpleNamespace(shape=tuple(state[name].shape)) for name in names if name in state}
            wanted = {names[name] for name in expected & names.keys()}
            found = set(quantizable_weights(architecture_of(self.model.config.to_dict(), tensors)))
            yield from (f"{template(name)} is stored in 4 bits by the tables alone" for name in found - wanted)
            yield from (f"{template(name)} is stored in 4 bits by transformers alone" for name in wanted - found)

    def _named(self, method: str) -> str | None:
        try:
            wanted = getattr(self.model, method)()
        except (NotImplementedError, AttributeError):
            return None
        return next((name for name, module in self.model.named_modules() if module is wanted), None)

    def _stored_names(self, *without: type) -> dict[str, str]:
        """The name on disk of each parameter that has one of its own there.

        transformers leaves out the changes of prefixes where a model was not read from a checkpoint; `without` names those.
        """
        conversions = [
            each for each in get_model_conversion_mapping(self.model, add_legacy=False) if not isinstance(each, without)
        ]
        backwards = [conversion.reverse_transform() for conversion in reversed(conversions)]
        converters = [each for each in backwards if isinstance(each, WeightConverter)]
        renamings = [each for each in backwards if not isinstance(each, WeightConverter)]
        alone = (name for name in self.architecture.tensors if apply_converters(name, converters)[1] is None)
        return {name: apply_renamings(name, renamings) for name in alone}

    def _same(self, name: str) -> str:
        """A name without the prefixes that a class with a head has and one without lacks."""
        prefixes = {"model", self.model.base_model_prefix}
        return ".".join(part for part in name.split(".") if part not in prefixes)


def _parameters(model: Any) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{leaf}" if path else leaf, module, parameter


def _role_by_type(module: nn.Module, *, is_tokens: bool, is_head: bool) -> Role | None:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return Role.TOKENS if is_tokens else Role.EMBEDDING
    if "Router" in kind:
        return Role.ROUTER
    if is_head:
        return Role.HEAD
    if isinstance(module, nn.Linear | Conv1D):
        return Role.LINEAR
    if isinstance(module, nn.modules.conv._ConvNd):
        return Role.CONVOLUTION
    return Role.NORM if "norm" in kind.lower() else None


def _accepted(expected: Role) -> set[Role]:
    """The roles that a module of this type may have as well: transformers has no type for them."""
    more = {
        Role.EMBEDDING: {Role.TOKENS},  # of the text tower of a model that has another input embedding, or none
        Role.LINEAR: {
            Role.CLASSIFIER,
            Role.EXPERTS,
            Role.HEAD,
        },  # a head of a model inside, or of one without a vocabulary
        Role.ROUTER: {Role.OTHER},  # a bias under a name of its own
    }
    return {expected} | more.get(expected, set())
