"""Advice for an embedding or a head with more or fewer rows than the base's, because the vocabularies differ in size."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.architecture import Architecture, Role

ROLES = frozenset({Role.TOKENS, Role.HEAD})
"""Roles of parameters with one row or one number for each token."""


def misfit_advice(name: str, trained: Sequence[int], found: Sequence[int], architecture: Architecture) -> str:
    """Return advice on the base's parameter `name`, whose shape is `found` where the adapter needs `trained`.

    The base may be another model, or the same one with a smaller or larger vocabulary.
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
