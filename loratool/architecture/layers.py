"""What the layers of a causal language model are made of, as far as its configuration does not say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ARRANGEMENTS: Final = ("llama", "gpt2", "opt", "gpt_neox")
"""The models whose layers others are like: modules, biases, norms and positions stand where theirs do."""

HEAD_NORMS: Final = ("", "of a head", "of all heads")


@dataclass(frozen=True, slots=True)
class Layers:
    """What a layer has, for counting parameters and memory without the weights.

    Attributes:
        like: whose modules it has: one of `ARRANGEMENTS`.
        activation: the MLP's where the configuration names none, as transformers calls it.
        norms: how many there are over the hidden size.
        head_norms: whether queries and keys have norms, over one head's numbers or over all.
        qkv_bias: queries, keys and values have biases whatever the configuration says.
        fused: one module makes queries, keys and values, and one makes gate and up.
    """

    like: str
    activation: str = "silu"
    norms: int = 2
    head_norms: str = ""
    qkv_bias: bool = False
    fused: bool = False
