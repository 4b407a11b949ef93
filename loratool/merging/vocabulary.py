"""Advice for an embedding or a head that the base has with more or fewer rows, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.architecture import Architecture, Role

ROLES = frozenset({Role.TOKENS, Role.HEAD})
"""Roles of parameters with one row or one number for each token."""


_CLASSES: Final = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""transformers' class for each of PEFT's task types with a classifier."""


def how_to_add_classifier(task: object, labels: int) -> str:
    """Return advice on a base that lacks the classifier of an adapter for `task`, PEFT's ``task_type``."""
    class_name = _CLASSES.get(str(task), _CLASSES["SEQ_CLS"])
    return (
        f"load the base in transformers as a classifier ({class_name}.from_pretrained(BASE, num_labels={labels})), save it with "
        "save_pretrained, and merge into that"
    )


def misfit_advice(name: str, trained: Sequence[int], found: Sequence[int], architecture: Architecture) -> str:
    """Return advice on the base's parameter `name`, whose shape is `found` where the adapter needs `trained`.

    The base may be another model, or the same one with a smaller or larger vocabulary.
    """
    is_vocabulary = architecture.role(name) in ROLES and trained[1:] == found[1:] and trained[0] != found[0]
    if not is_vocabulary:
        return "is it the right base?"
    is_grown = trained[0] > found[0]
    return (
        f"it was trained with a vocabulary of {trained[0]:,} tokens and the base has {found[0]:,}: "
        f"{'grow' if is_grown else 'cut'} the base's first (in transformers, model.resize_token_embeddings({trained[0]}), then "
        f"save_pretrained), and merge into that{'' if is_grown else ', or into the base that it was trained on'}"
    )
