"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) of torch, or bitsandbytes' paged one for a QLoRA on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from loratool.training.recipe import Recipe


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], recipe: Recipe, *, paged: bool
) -> torch.optim.Optimizer:
    """Make the optimizer of these parameters. With `paged`, its moments are in memory that CUDA can move to the host."""
    import torch

    if paged:
        from bitsandbytes import optim

        paged_adamw: Any = optim.PagedAdamW32bit  # type: ignore[attr-defined]
        made: torch.optim.Optimizer = paged_adamw(parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        return made
    return torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state of each parameter as tensors, by the parameter's name."""
    import torch

    return {
        name: {key: torch.as_tensor(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def load_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter],
                 saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:  # fmt: skip
    """Restore the state that `moments` returned."""
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key, tensor in saved.get(name, {}).items():
            is_count = key == "step"
            state[key] = tensor if is_count else tensor.to(parameter.device)
