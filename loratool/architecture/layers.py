"""The makeup of the layers of a causal language model, where its configuration does not describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ARRANGEMENTS: Final = ("llama", "gpt2", "opt", "gpt_neox")
"""The models whose modules, biases, norms and positions others share."""

HEAD_NORMS: Final = ("", "of a head", "of all heads")


@dataclass(frozen=True, slots=True)
class Layers:
    """The makeup of a layer, for counting parameters and memory without the weights.

    Attributes:
        like: the model with the same modules, one of `ARRANGEMENTS`.
        activation: the MLP's activation if the configuration names none, by transformers' name.
        norms: number of norms that span the hidden size.
        head_norms: whether queries and keys have norms, over one head's numbers or over all; one of `HEAD_NORMS`.
        qkv_bias: whether queries, keys and values have biases whatever the configuration says.
        fused: whether one module makes queries, keys and values, and one makes gate and up.
    """

    like: str
    activation: str = "silu"
    norms: int = 2
    head_norms: str = ""
    qkv_bias: bool = False
    fused: bool = False
