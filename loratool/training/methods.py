"""An adapter at work in a model: what the training loop sees of a method, and how one is put there."""

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

    A step is `begin_step`, then forward and backward passes, with `penalty` added once and whole to the loss of one of
    them, then `after_backward`, then clipping and the optimizer, then `after_step`. What a step draws is a function of the
    seed and the step, so resuming needs the parameters, the optimizer and `buffers` alone, and all processes draw the same.
    """

    @property
    def method(self) -> str:
        """``lora``, ``dylora`` or ``adalora``."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that it can act at, ascending: those of a DyLoRA, else its one (an AdaLoRA's initial) rank."""

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """What is trained, fp32: module and factor (``model.layers.0.self_attn.q_proj.A``), in the model's order."""

    def act_at(self, rank: int) -> None:
        """Act at one of `ranks` from now on, until the next `begin_step`; for evaluation."""

    def begin_step(self, step: int) -> None:
        """Make ready for the forward passes of `step`: a DyLoRA draws its rank."""

    def penalty(self) -> torch.Tensor | None:
        """What a step adds to the loss, a scalar with a gradient: an AdaLoRA's weighted regularization; or None."""

    def after_backward(self, step: int) -> None:
        """Take note of the gradients, as they are before they are clipped: an AdaLoRA's importance."""

    def after_step(self, step: int) -> None:
        """Mend the parameters after the optimizer changed them: an AdaLoRA keeps within its budget."""

    def buffers(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint holds beside parameters and optimizer; empty but for AdaLoRA. On its parameters' device."""

    def load_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Take `buffers` back.

        Raises:
            LoratoolError: they are those of another adapter.
        """

    def figures(self) -> Mapping[str, Any]:
        """What the log should say of the step: of a DyLoRA ``rank``, drawn; of an AdaLoRA ``budget`` (the total of its
        ranks) and ``ranks`` by module."""

    def config(self) -> dict[str, Any]:
        """The PEFT configuration that its files have, without what the loop knows (``base_model_name_or_path``, ...)."""

    def facts(self) -> dict[str, Any]:
        """What ``loratool.json`` must say for its files to be read as what they are: ``kind`` and ``scaling`` of a DyLoRA.

        Of an AdaLoRA also the ``importance`` of its components.
        """

    def adapter(self, draft: Draft, name: str, config: Mapping[str, Any] | None = None,
                facts: Mapping[str, Any] | None = None) -> Adapter:  # fmt: skip
        """The adapter as it is now, its factors in `draft`, fp32, cut to the ranks that are left.

        `config` and `facts` are added to its own.
        """

    def merge(self) -> None:
        """Add the update to the model's own weights, rounded once to their type; the layers then compute those alone.

        Raises:
            UnsupportedError: a weight is in 4 bits.
        """

    def unmerge(self) -> None:
        """Take the update out of the weights again, bit for bit."""

    def detach(self) -> None:
        """Give the model its own modules back. It stays frozen."""


def attach(model: torch.nn.Module, options: Options, *, targets: str | Sequence[str] | None = None, seed: int = 0,
           total_steps: int = 1) -> Adaptation:  # fmt: skip
    """Freeze `model` and wrap its target modules in place with the layers of a method; the model computes what it did.

    Args:
        targets: names, a pattern, ``all-linear`` or None for that (see `choose_targets`).
        seed: of the factors, and of what steps draw.
        total_steps: of the optimizer; AdaLoRA's schedule is made of it.

    Raises:
        NotFoundError: a target is no module of the model.
        UnsupportedError: a target is no linear layer, or is in 8 bits.
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
