"""Tied weights: one matrix that a model uses twice, as its input embedding and as its output head.

transformers saves such a matrix once, or twice with equal bytes, and ties the two again when it loads them. A LoRA on
one of the two cannot be merged: the change would be lost, or would reach the other use as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.model import Checkpoint
from loratool.errors import PlacementError, quoted
from loratool.formats.names import OUTPUT_HEADS

EMBEDDINGS: Final = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
"""How the names of input embeddings end."""


def refuse_tied(targets: Iterable[str], base: Checkpoint) -> None:
    """Raise PlacementError if one of the tensors named in `targets` shares its values with an input embedding."""
    for name, embedding in tied(targets, base).items():
        raise PlacementError(
            f"{quoted(name)} is tied to the embedding {quoted(embedding)}: a change of one would be lost or "
            "would change the other; untie them (tie_word_embeddings: false) before merging into it"
        )


def tied(names: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """Those tensors of `names` that share their values with an input embedding, and the name of that.

    They do where the two have the same dtype and shape and the configuration ties them, or does not say so and their
    bytes are equal.
    """
    embeddings = [info for name, info in base.tensors.items() if name.endswith(EMBEDDINGS)]
    found = {}
    for name in names:
        info = base.tensors[name]
        for embedding in embeddings:
            alike = (embedding.dtype, embedding.shape) == (info.dtype, info.shape) and embedding is not info
            if alike and _are_tied(info, embedding, base):
                found[name] = embedding.name
    return found


def is_tied_embedding(name: str, base: Checkpoint) -> bool:
    """Whether `name` is an input embedding that the model uses as its output head as well.

    One that stores no head of its own does, unless it says otherwise, where it is a language model.
    """
    if not name.endswith(EMBEDDINGS):
        return False
    heads = [other for other in base.tensors if other.removesuffix(".weight").rsplit(".", 1)[-1] in OUTPUT_HEADS]
    if heads:
        return name in tied(heads, base).values()
    declared = _declared(base)
    return ("LM" in str(base.config.get("architectures"))) if declared is None else declared


def _are_tied(head: TensorInfo, embedding: TensorInfo, base: Checkpoint) -> bool:
    declared = _declared(base)
    return hash_tensor(head) == hash_tensor(embedding) if declared is None else declared


def _declared(base: Checkpoint) -> bool | None:
    """What the configuration says of ties, or None."""
    text_config = base.config.get("text_config")
    declared = base.config.get("tie_word_embeddings")
    if declared is None and isinstance(text_config, dict):
        declared = text_config.get("tie_word_embeddings")
    return declared if isinstance(declared, bool) else None
