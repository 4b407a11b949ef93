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

EMBEDDINGS: Final = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
"""How the names of input embeddings end."""


def refuse_tied(targets: Iterable[str], base: Checkpoint) -> None:
    """Raise PlacementError if one of the tensors named in `targets` shares its values with an input embedding.

    It does where the two have the same dtype and shape and the configuration ties them, or does not say so and their
    bytes are equal.
    """
    embeddings = [info for name, info in base.tensors.items() if name.endswith(EMBEDDINGS)]
    for name in targets:
        info = base.tensors[name]
        for embedding in embeddings:
            alike = (embedding.dtype, embedding.shape) == (info.dtype, info.shape) and embedding is not info
            if alike and _are_tied(info, embedding, base):
                raise PlacementError(
                    f"{quoted(name)} is tied to the embedding {quoted(embedding.name)}: a change of one would be lost or "
                    "would change the other; untie them (tie_word_embeddings: false) before merging into it"
                )


def _are_tied(head: TensorInfo, embedding: TensorInfo, base: Checkpoint) -> bool:
    text_config = base.config.get("text_config")
    declared = base.config.get("tie_word_embeddings")
    if declared is None and isinstance(text_config, dict):
        declared = text_config.get("tie_word_embeddings")
    if isinstance(declared, bool):
        return declared
    return hash_tensor(head) == hash_tensor(embedding)
