"""The product of a LoRA's factors: of a linear layer, a convolution or an embedding.

Factors of a convolution are its kernels, A (r, in, k...) and B (out, r, 1...), in tensors named as a linear layer's. PEFT 0.21
saves those of an embedding as ``lora_embedding_A`` (r, tokens) and ``lora_embedding_B`` (features, r), without ``.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping

from loratool.checkpoint.header import TensorInfo
from loratool.updates.convolution import Convolution
from loratool.updates.embedding import Embedding
from loratool.updates.low_rank import LowRank

Product = LowRank | Convolution | Embedding


def product_of(factors: Mapping[str, TensorInfo], scaling: float) -> Product:
    """Return ``scaling * B A`` of a module's factors by their letters; those of an embedding are ``embedding_A`` and ``_B``."""
    if "embedding_A" in factors:
        return Embedding(LowRank(factors["embedding_A"], factors["embedding_B"], scaling))
    a, b = factors["A"], factors["B"]
    return LowRank(a, b, scaling) if len(a.shape) == 2 else Convolution(a, b, scaling)
