"""Vocabularies of different sizes: what to say where an embedding or a head has more rows than the base's, or fewer."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.architecture import Architecture, Role

ROLES = frozenset({Role.TOKENS, Role.HEAD})
"""Roles of parameters with one row, or one number, for each token."""


def misfit_advice(name: str, trained: Sequence[int], found: Sequence[int], architecture: Architecture) -> str:
    """Say what to do about the base's parameter `name`, which has the shape `found` where another, `trained`, is needed.

    It may be another model, or the same with a smaller or larger vocabulary.
    """
    is_vocabulary = architecture.role(name) in ROLES and trained[1:] == found[1:] and trained[0] != found[0]
    if not is_vocabulary:
        return "is it the right base?"
    if trained[0] > found[0]:
        return (
            f"it was trained with a vocabulary of {trained[0]:,} tokens and the base has {found[0]:,}: grow the base's first (in "
            f"transformers, model.resize_token_embeddings({trained[0]}), then save_pretrained), and merge into that"
        )
    return (
        f"it was trained with a vocabulary of {trained[0]:,} tokens and the base has {found[0]:,}, grown or padded since: merge "
        "into the base that it was trained on"
    )
