"""The interface between the training loop and a method, and the function that puts a method's layers into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from loratool.training.options import AdaLoRA, DyLoRA, LoRA, Options
from loratool.training.targets import choose_targets

if TYPE_CHECKING:
    import torch

    from loratool.formats.adapter import Adapter
    from loratool.formats.adapter_draft import Draft


class Adaptation(Protocol):
    """A model's adapter while it is trained. Steps are those of the optimizer, counted from 0.

    A step consists of `begin_step`; forward and backward passes; one backward pass of `penalty`; `after_backward`; clipping
    and the optimizer; `after_step`. What a step draws depends only on the seed and the step. Resuming therefore needs only
    the parameters, the optimizer and `buffers`, and all processes draw the same.
    """

    @property
    def method(self) -> str:
        """``lora``, ``dylora`` or ``adalora``."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks it can act at, ascending: all of a DyLoRA's, or the only one of others (an AdaLoRA's initial rank)."""

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """Return the trained parameters, fp32, in the model's order.

        Names are a module and a factor, such as ``model.layers.0.self_attn.q_proj.A``.
        """

    def act_at(self, rank: int) -> None:
        """Act at one of `ranks` until the next `begin_step`. Evaluation uses this."""

    def begin_step(self, step: int) -> None:
        """Prepare the forward passes of `step`. A DyLoRA draws its rank here."""

    def penalty(self) -> torch.Tensor | None:
        """Return a scalar with a gradient to add to the loss, or None. An AdaLoRA returns its weighted regularization."""

    def after_backward(self, step: int) -> None:
        """Read the gradients before they are clipped. An AdaLoRA updates its importance here."""

    def after_step(self, step: int) -> None:
        """Adjust the parameters after the optimizer changed them. An AdaLoRA cuts down to its budget here."""

    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Return what a checkpoint holds besides parameters and optimizer, on the parameters' device.

        It is empty for every method except AdaLoRA.
        """

    def load_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Restore `buffers`.

        Raises:
            LoratoolError: they belong to a different adapter.
        """

    def figures(self) -> Mapping[str, Any]:
        """Return the method's figures of this step for the log.

        A DyLoRA has the ``rank`` that was drawn. An AdaLoRA has its ``budget`` (the sum of its ranks) and ``ranks`` by module.
        """

    def config(self) -> dict[str, Any]:
        """Return the PEFT configuration for its files, without what the loop adds (``base_model_name_or_path``, ...)."""

    def facts(self) -> dict[str, Any]:
        """Return the facts that ``loratool.json`` needs so that the files are read as this method's.

        A DyLoRA has ``kind`` and ``scaling``. An AdaLoRA has the ``importance`` of its components.
        """

    def adapter(self, draft: Draft, name: str, config: Mapping[str, Any] | None = None,
                facts: Mapping[str, Any] | None = None) -> Adapter:  # fmt: skip
        """Return the adapter in its current state, with its fp32 factors in `draft`, cut to the ranks that remain.

        `config` and `facts` are added to its own.
        """

    def merge(self) -> None:
        """Add the update to the model's own weights, rounded once to their dtype. The layers then use only these weights.

        Raises:
            UnsupportedError: a weight is in 4 bits.
        """

    def unmerge(self) -> None:
        """Remove the update from the weights, which are restored bit for bit."""

    def detach(self) -> None:
        """Put the model's own modules back. Its parameters stay frozen."""


def attach(model: torch.nn.Module, options: Options, *, targets: str | Sequence[str] | None = None, seed: int = 0,
           total_steps: int = 1) -> Adaptation:  # fmt: skip
    """Freeze `model` and wrap its target modules in place with the layers of a method. Its outputs stay the same.

    Args:
        targets: names, a pattern, or ``all-linear``, the default (see `choose_targets`).
        seed: the seed of the factors' initial numbers and of what steps draw.
        total_steps: the number of optimizer steps, which AdaLoRA's schedule depends on.

    Raises:
        NotFoundError: a target is not a module of the model.
        UnsupportedError: a target is not a linear layer, or is in 8 bits.
        LoratoolError: the schedule of an AdaLoRA does not fit into `total_steps`.
    """
    chosen = choose_targets(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if isinstance(options, LoRA):
        from loratool.training.lora import attach_lora

        return attach_lora(model, chosen, options, seed)
    if isinstance(options, DyLoRA):
        from loratool.training.dylora import attach_dylora

        return attach_dylora(model, chosen, options, seed)
    assert isinstance(options, AdaLoRA)
    from loratool.training.adalora import attach_adalora

    return attach_adalora(model, chosen, options, seed, total_steps)
