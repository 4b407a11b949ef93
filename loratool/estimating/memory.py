"""The memory that training takes: weights, gradients, the optimizer's moments, and what a step keeps for its backward pass.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3.1) for weights, gradients and moments; Dettmers et al.
2023 (QLoRA, arXiv:2305.14314, sections 2 and 3) for weights in 4 bits; Korthikanti et al. 2022 (arXiv:2205.05198, equations
1 and 2) for activations. The last count what autograd keeps of each operation; this module does the same for current layers.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from loratool.estimating.shape import ModelShape, module_input

Optimizer = Literal["adamw", "adamw-8bit", "adamw-paged", "sgd"]
Attention = Literal["sdpa", "eager"]

MOMENTS: Final[Mapping[Optimizer, int]] = {"adamw": 8, "adamw-8bit": 2, "adamw-paged": 0, "sgd": 0}
"""Bytes on the device per trained parameter: two fp32 moments; two of 8 bits; two fp32 paged to the host; none."""

DTYPES: Final[Mapping[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK: Final = 64
NESTED_BLOCK: Final = 256

_KEPT_OF_ACTIVATIONS: Final[Mapping[str, int]] = {"relu": 0, "gelu_new": 4, "gelu_fast": 4, "gelu_python": 4}
"""Tensors that autograd keeps of an activation besides its result. Most keep their input; one written out as several
operations keeps the tensors between them."""

_LOGIT_BYTES: Final = 12
"""Bytes per logit as the backward pass begins: the log-softmax in fp32, and two gradients of the same size."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that training takes. Each attribute is the largest value over a step, so the peak is at most their sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all attributes, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Step:
    """The batch that one forward and backward pass reads, and how it is computed.

    Attributes:
        batch_size: rows of a batch, all padded to one length.
        length: tokens in a row.
        compute: bytes per number in the compute dtype, which is also the dtype of weights that are not in 4 bits.
        attention: ``sdpa`` keeps no attention scores; ``eager`` keeps them.
        checkpointing: True for gradient checkpointing: keep only each layer's input and compute the layer again.
    """

    batch_size: int
    length: int
    compute: int = 2
    attention: Attention = "sdpa"
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return self.batch_size * self.length


class Trains(Protocol):
    """The factors that a method trains on each module."""

    @property
    def averages(self) -> int:
        """Number of moving averages that training keeps of each parameter."""

    def factor_shapes(self, rank: int, outputs: int, inputs: int) -> Mapping[str, tuple[int, int]]:
        """Return the shape of each factor, by its letter."""


def adapter_parameters(shape: ModelShape, modules: Collection[str], rank: int, method: Trains) -> int:
    """Return the number of parameters of an adapter on `modules`.

    Each module has A (rank, in) and B (out, rank): ``rank * (in + out)`` parameters (LoRA, arXiv:2106.09685, section 4.1).
    AdaLoRA adds Lambda, another ``rank`` (arXiv:2303.10512, equation 3).
    """
    linears = [shape.linears[module] for module in modules]
    factors = (method.factor_shapes(rank, linear.out_features, linear.in_features).values() for linear in linears)
    return sum(rows * columns for each in factors for rows, columns in each)


def nf4_bytes(shape: ModelShape) -> int:
    """Return the bytes of all linear weights in NF4 with double quantization.

    A parameter takes 4.127 bits (QLoRA, section 3): 4 of its code, ``8 / 64`` of its block's scale, and ``32 / (64 * 256)``
    of the scale of scales.
    """
    total = 0
    for linear in shape.linears.values():
        blocks = -(-linear.parameters // BLOCK)
        total += -(-linear.parameters // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK)
    return total


def full_memory(shape: ModelShape, step: Step, optimizer: Optimizer) -> Memory:
    """Return the memory of full fine-tuning: weights and gradients in the compute dtype, and moments of every parameter.

    With 16-bit weights and AdamW that is 12 bytes per parameter (QLoRA, section 1: more than 780 GB for 65 B).
    """
    return Memory(
        weights=shape.parameters * step.compute,
        gradients=shape.parameters * step.compute,
        optimizer=shape.parameters * MOMENTS[optimizer],
        activations=activation_bytes(shape, step, None),
    )


def adapter_memory(shape: ModelShape, step: Step, optimizer: Optimizer, modules: Collection[str], rank: int, *,
                   method: Trains, adapter_dtype: str, quantized: bool) -> Memory:  # fmt: skip
    """Return the memory of training an adapter, whose parameters alone have gradients and moments.

    With `quantized`, linear weights are in NF4 (QLoRA). AdaLoRA also keeps two fp32 moving averages per parameter
    (arXiv:2303.10512, equations 9 and 10), which are counted with the moments.
    """
    adapter = adapter_parameters(shape, modules, rank, method)
    weights = shape.parameters * step.compute
    decoded = 0
    if quantized:
        weights = (shape.parameters - shape.linear_parameters) * step.compute + nf4_bytes(shape)
        decoded = max(linear.parameters for linear in shape.linears.values()) * step.compute
    width = DTYPES[adapter_dtype]
    averages = method.averages * 4
    return Memory(
        weights=weights + adapter * width,
        gradients=adapter * width,
        optimizer=adapter * (MOMENTS[optimizer] + averages),
        activations=activation_bytes(shape, step, dict.fromkeys(modules, rank)) + decoded,
    )


def activation_bytes(shape: ModelShape, step: Step, ranks: Mapping[str, int] | None) -> int:
    """Return the bytes that autograd keeps of one pass: of all layers and of the logits.

    With gradient checkpointing, that is the input of every layer plus the larger of two: one recomputed layer (Korthikanti
    et al., section 5), or the logits, which are freed before. Logits are counted for every token; a trainer that scores
    only completions makes fewer.

    Args:
        ranks: rank by adapted module; None for full fine-tuning, which keeps the input of every weight.
    """
    layer = step.tokens * layer_bytes(shape, step, ranks) + step.batch_size * _score_bytes(shape, step)
    layer += step.tokens * step.compute * sum((ranks or {}).values()) // shape.layers  # A x of each adapter
    norm = _norm_bytes(shape, step, is_full=ranks is None) + shape.hidden * step.compute * (ranks is None)
    logits = step.tokens * (norm + shape.vocabulary * _LOGIT_BYTES)
    if step.checkpointing:
        return shape.layers * step.tokens * shape.hidden * step.compute + max(layer, logits)
    return shape.layers * layer + logits


def layer_bytes(shape: ModelShape, step: Step, ranks: Mapping[str, int] | None) -> int:
    """Return the bytes per token that autograd keeps of one layer, without the attention scores.

    With ``_score_bytes``, a 16-bit GPT layer with dropout keeps ``s b h (34 + 5 a s / h)`` bytes (Korthikanti et al.,
    equation 1), for s tokens, b rows, hidden size h and a heads. A frozen weight keeps no input, but an adapter on it does.
    """
    read = None if ranks is None else {module_input(module) for module in ranks}

    def keeps(what: str) -> bool:
        return read is None or what in read

    queries = shape.heads * shape.head_dim
    # With a padding mask, transformers repeats keys and values to the number of query heads before it calls sdpa.
    is_spread = step.attention == "eager" or step.batch_size > 1
    keys = (shape.heads if is_spread else shape.kv_heads) * shape.head_dim
    elements = shape.hidden * (keeps("attention input") + keeps("mlp input"))
    elements += queries + 2 * keys
    elements += queries if step.attention == "sdpa" or keeps("attention output") else 0
    elements += _mlp_elements(shape, keeps_product=keeps("mlp output"))
    norms = shape.norms * _norm_bytes(shape, step, is_full=read is None)
    heads = (4 + step.compute * (read is None)) * (queries + shape.kv_heads * shape.head_dim) * shape.normed_heads
    lse = 4 * shape.heads if step.attention == "sdpa" else 0
    return elements * step.compute + norms + heads + lse + 2 * shape.hidden * shape.dropout


def _mlp_elements(shape: ModelShape, *, keeps_product: bool) -> int:
    """Return the elements per token that an MLP keeps: of its activation, of a gate's two factors, and its last input."""
    kept = _KEPT_OF_ACTIVATIONS.get(shape.activation, 1)
    if shape.gated:
        return shape.intermediate * (kept + 2 + keeps_product)
    # If the activation keeps its result, that is the same tensor that the last module reads.
    return shape.intermediate * (kept + (keeps_product or kept == 0))


def _norm_bytes(shape: ModelShape, step: Step, *, is_full: bool) -> int:
    """Return the bytes per token that a norm keeps.

    transformers' RMS norm keeps its input in fp32 and, to compute its weight's gradient, the normalized input.
    """
    if not shape.rms_norms:
        return shape.hidden * step.compute
    return shape.hidden * (4 + step.compute * is_full)


def _score_bytes(shape: ModelShape, step: Step) -> int:
    """Return the bytes of attention scores that autograd keeps of one row.

    The softmax, and with dropout its mask and result, take ``5 a s^2`` bytes in 16 bits. Every model except GPT-2 computes
    the softmax in fp32 and keeps it next to its 16-bit copy.
    """
    if step.attention == "sdpa":
        return 0
    width = step.compute + (step.compute + 1) * shape.dropout
    width += 4 if step.compute < 4 and shape.model_type != "gpt2" else 0
    return shape.heads * step.length**2 * width
