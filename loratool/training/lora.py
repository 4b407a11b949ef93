"""LoRA (Hu et al. 2021, arXiv:2106.09685): ``h = W x + alpha / r * B A x`` (section 4.1), A random, B zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from torch import Tensor, nn

from loratool.errors import LoratoolError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.training.layers import AdaptedLinear, fill_randomly, new_factor
from loratool.training.options import Initialisation, LoRA, LowRankOptions
from loratool.training.targets import Targets

if TYPE_CHECKING:
    from loratool.formats.adapter_draft import Draft

TASK: Final = "CAUSAL_LM"


class LoRALinear(AdaptedLinear):
    """A linear layer with A (r, in_features) and B (out_features, r)."""

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(base, dropout)
        device = self.weight.device
        self.lora_A = new_factor((rank, self.in_features), device)
        self.lora_B = new_factor((self.out_features, rank), device)
        self.scaling = scaling

    def leading_product(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.lora_B, self.scaling

    def fill(self, name: str, initialisation: Initialisation, seed: int) -> None:
        """Fill A with random numbers. B stays zero."""
        if initialisation == "gaussian":
            fill_randomly(self.lora_A, f"{name}.A", seed, normal=1 / len(self.lora_A))
        else:
            fill_randomly(self.lora_A, f"{name}.A", seed, uniform=1 / math.sqrt(self.in_features))


Layer = TypeVar("Layer", bound=AdaptedLinear)
Chosen = TypeVar("Chosen")


class LowRankAdaptation(Generic[Layer, Chosen]):
    """The layers of one adapter in a model, by the names of their modules.

    It implements `loratool.training.methods.Adaptation` for a method that does nothing between steps.
    """

    method = ""

    def __init__(self, model: nn.Module, targets: Targets, options: Chosen, wrap: Callable[[nn.Module], Layer]) -> None:
        self.model, self.targets, self.options = model, targets, options
        self.layers = {name: wrap(module) for name, module in targets.modules.items()}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)

    @property
    def ranks(self) -> tuple[int, ...]:
        return (next(iter(self.layers.values())).get_parameter("lora_A").shape[0],)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{letter}": factor for name, layer in self.layers.items() for letter, factor in layer.factors()}

    def act_at(self, rank: int) -> None:
        if rank not in self.ranks:
            raise LoratoolError(f"the adapter acts only at rank {self.ranks[-1]}, not at {rank}")

    def begin_step(self, step: int) -> None:
        """Do nothing."""

    def penalty(self) -> Tensor | None:
        return None

    def after_backward(self, step: int) -> None:
        """Do nothing."""

    def after_step(self, step: int) -> None:
        """Do nothing."""

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        if buffers:
            raise LoratoolError(f"the checkpoint holds the state of a different method than {self.method}")

    def figures(self) -> dict[str, Any]:
        return {}

    def config(self) -> dict[str, Any]:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return {}

    def adapter(self, draft: Draft, name: str, config: Mapping[str, Any] | None = None,
                facts: Mapping[str, Any] | None = None) -> Adapter:  # fmt: skip
        for module, layer in self.layers.items():
            draft.put_factors(module, dict(layer.factors()))
        return draft.adapter(name, self.config() | dict(config or {}), self.facts() | dict(facts or {}))

    def merge(self) -> None:
        packed = [name for name, layer in self.layers.items() if type(layer.weight).__name__ == "Params4bit"]
        if packed:
            raise UnsupportedError(
                f"{quoted(packed[0])} is stored in 4 bits, where rounding would lose most of the update; save the adapter and "
                "merge it with 'loratool merge', which delivers it"
            )
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        for layer in self.layers.values():
            layer.unmerge()

    def detach(self) -> None:
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.base)


class LoRAAdaptation(LowRankAdaptation[LoRALinear, LoRA]):
    """A LoRA in a model."""

    method = "lora"

    def config(self) -> dict[str, Any]:
        return peft_lora_config(self.options, self.targets)


def attach_lora(model: nn.Module, targets: Targets, options: LoRA, seed: int) -> LoRAAdaptation:
    """Wrap the targets in LoRA layers."""
    adaptation = LoRAAdaptation(
        model, targets, options, lambda base: LoRALinear(base, options.rank, options.scaling, options.dropout)
    )
    for name, layer in adaptation.layers.items():
        layer.fill(name, options.initialisation, seed)
    return adaptation


def peft_lora_config(options: LowRankOptions, targets: Targets) -> dict[str, Any]:
    """Return the ``peft.LoraConfig`` of a LoRA, or of a DyLoRA at its full rank, as JSON."""
    return {
        "peft_type": "LORA",
        "task_type": TASK,
        "r": options.rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.dropout,
        "use_rslora": options.rslora,
        "init_lora_weights": True if options.initialisation == "kaiming" else "gaussian",
        "target_modules": list(targets.names),
        "fan_in_fan_out": targets.fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }
