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

EMBEDDINGS: Final = frozenset({
    "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "embeddings", "tokens_embed",
    "word_embedding",
})  # fmt: skip
"""What input embeddings are called: the last components of their modules' names."""

GENERATING: Final = ("CausalLM", "MaskedLM", "LMHead", "ConditionalGeneration")
"""Words in the names of classes that have an output head."""

HEADLESS: Final = ("Classification", "QuestionAnswering")
"""And in those of classes that have none, but another head in its place."""


def refuse_tied(targets: Iterable[str], base: Checkpoint) -> None:
    """Raise PlacementError if one of the tensors named in `targets` shares its values with an input embedding."""
    for name, embedding in tied(targets, base).items():
        raise PlacementError(
            f"{quoted(name)} is tied to the embedding {quoted(embedding)}: a change of one would be lost or "
            "would change the other; untie them (tie_word_embeddings: false) before merging into it"
        )


def tied(names: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """Those tensors of `names` that share their values with an input embedding, and the name of that.

    They do where the two have the same dtype and shape and equal bytes; an output head whatever its bytes are where the
    configuration ties it, and never where that says that it does not.
    """
    embeddings = [info for name, info in base.tensors.items() if _is_embedding(name)]
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

    A model that writes text and stores no head of its own does, whatever it says.
    """
    if not _is_embedding(name):
        return False
    heads = [other for other in base.tensors if _leaf(other) in OUTPUT_HEADS]
    if heads:
        return name in tied(heads, base).values()
    architecture = str(base.config.get("architectures"))
    if any(word in architecture for word in GENERATING):
        return True
    return _declared(base) is True and not any(word in architecture for word in HEADLESS)


def _are_tied(matrix: TensorInfo, embedding: TensorInfo, base: Checkpoint) -> bool:
    declared = _declared(base)
    if declared is None or (declared and _leaf(matrix.name) not in OUTPUT_HEADS):
        return hash_tensor(matrix) == hash_tensor(embedding)
    return declared


def _is_embedding(name: str) -> bool:
    return name.endswith(".weight") and _leaf(name) in EMBEDDINGS


def _leaf(name: str) -> str:
    """What the module is called that a weight belongs to."""
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _declared(base: Checkpoint) -> bool | None:
    """What the configuration says of ties, or None.

    Of a model that has a text model inside, either may tie them; that the text model does not is no answer, since the whole
    has a default of its own.
    """
    text_config = base.config.get("text_config")
    inside = text_config.get("tie_word_embeddings") if isinstance(text_config, dict) else None
    declared = base.config.get("tie_word_embeddings")
    return True if True in (declared, inside) else declared if isinstance(declared, bool) else None
