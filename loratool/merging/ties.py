"""Tied weights: one matrix that a model uses twice, as its input embedding and as its output head.

transformers saves such a matrix once, or twice with equal bytes, and ties the two again on loading. A LoRA on one of the
two cannot be merged: the change would be lost, or would also affect the other use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from loratool.architecture import Architecture, Role, any_model, architecture_of
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.header import TensorInfo
from loratool.errors import PlacementError, quoted
from loratool.formats.adapter import Adapter
from loratool.updates import Update
from loratool.weights.storage import Model

UNTIE: Final = "--untie"


def refuse_tied(targets: Iterable[str], base: Model, architecture: Architecture | None = None) -> None:
    """Raise PlacementError if one of the tensors named in `targets` shares its values with an input embedding."""
    for name, embedding in tied(targets, base, architecture).items():
        raise PlacementError(
            f"{quoted(name)} is tied to the embedding {quoted(embedding)}: a change of one would be lost or "
            f"would change the other; {how_to_untie(base)}"
        )


def how_to_untie(base: Model) -> str:
    """Return advice on how to give the input embedding and the output head of `base` separate tensors."""
    if can_untie(base):
        return f"merge with {UNTIE}, which gives each a tensor of its own in the new model"
    return (
        "load the model in transformers, give the head a copy of its weight, set tie_word_embeddings to False, save it, and "
        "merge into that"
    )


def can_untie(base: Model) -> bool:
    """Return whether a merge can untie `base`: a causal language model with one embedding and one head."""
    architecture = architecture_of(base.config, base.tensors)
    classes = str(base.config.get("architectures"))
    is_decoder = ("CausalLM" in classes or "LMHeadModel" in classes) and not base.config.get("is_encoder_decoder")
    one_each = len(architecture.weights(Role.TOKENS)) == 1 and len(architecture.weights(Role.HEAD)) <= 1
    return is_decoder and one_each


def tied(names: Iterable[str], base: Model, architecture: Architecture | None = None) -> dict[str, str]:
    """Return the tensors among `names` that are tied to an input embedding, with the name of the embedding.

    Two tensors are tied if they have the same dtype, shape and bytes. For an output head the configuration decides, if it says
    whether the head is tied.
    """
    architecture = architecture or architecture_of(base.config, base.tensors)
    embeddings = [base.tensors[name] for name in architecture.weights(Role.TOKENS)]
    found = {}
    for name in names:
        info = base.tensors[name]
        for embedding in embeddings:
            alike = (embedding.dtype, embedding.shape) == (info.dtype, info.shape) and embedding is not info
            if alike and _are_tied(info, embedding, architecture):
                found[name] = embedding.name
    return found


def tied_copies(name: str, base: Model) -> tuple[str, ...]:
    """Return the output heads that are tied to the input embedding `name` and are stored as tensors of their own."""
    architecture = architecture_of(base.config, base.tensors)
    if architecture.role(name) is not Role.TOKENS:
        return ()
    heads = tied(architecture.weights(Role.HEAD), base, architecture)
    return tuple(head for head, embedding in heads.items() if embedding == name)


def keeps_tie(adapter: Adapter, parameter: str) -> bool:
    """Return whether an adapter replaces an embedding together with the head that is tied to it.

    Its configuration says so (``ensure_weight_tying``), or it holds equal numbers for both. PEFT saves both of a tied pair if the
    vocabulary was resized (``save_embedding_layers``).
    """
    update = adapter.changes[parameter]
    if not update.replaces or any_model().role(parameter) is not Role.TOKENS:
        return False
    return bool(adapter.config.get("ensure_weight_tying")) or any(
        other.replaces
        and other.shape == update.shape
        and any_model().role(name) is Role.HEAD
        and _digests(other) == _digests(update)
        for name, other in adapter.changes.items()
    )


def goes_with_embedding(adapter: Adapter, parameter: str, base: Model) -> bool:
    """Return whether a head that an adapter replaces is the embedding's own, since both are tied in `base`.

    PEFT saves such a head again beside the embedding.
    """
    update = adapter.changes[parameter]
    if not update.replaces or any_model().role(parameter) is not Role.HEAD:
        return False
    embeddings = (name for name in adapter.changes if name.endswith(".weight") and keeps_tie(adapter, name))
    twins = [adapter.changes[name] for name in embeddings]
    architecture = architecture_of(base.config, base.tensors)
    is_tied = any(is_tied_embedding(name, base) for name in architecture.weights(Role.TOKENS))
    return is_tied and any(_digests(twin) == _digests(update) for twin in twins)


def _digests(update: Update) -> list[str]:
    return [hash_tensor(info) for info in update.tensors.values()]


def stored_twin(name: str, base: Model, architecture: Architecture) -> str | None:
    """Return the stored tensor that has the values of a parameter which the base lacks, as of the second name of a head's bias.

    None if there is none, or if it is an embedding, which has another use.
    """
    twins = architecture.tied(name)
    return next((
        stored for stored in base.tensors
        if architecture.canonical(stored) in twins and not architecture.is_embedding(stored)
    ), None) if twins else None  # fmt: skip


def is_tied_embedding(name: str, base: Model) -> bool:
    """Return whether `name` is an input embedding that the model also uses as its output head.

    A generating model without a stored head always does, whatever its configuration says.
    """
    architecture = architecture_of(base.config, base.tensors)
    if architecture.role(name) is not Role.TOKENS:
        return False
    heads = architecture.weights(Role.HEAD)
    if heads:
        return name in tied(heads, base, architecture).values()
    return architecture.writes_tokens or (architecture.declares_ties is True and not architecture.has_another_head)


def _are_tied(matrix: TensorInfo, embedding: TensorInfo, architecture: Architecture) -> bool:
    declared = architecture.declares_ties
    if declared is None or (declared and architecture.role(matrix.name) is not Role.HEAD):
        return hash_tensor(matrix) == hash_tensor(embedding)
    return declared
