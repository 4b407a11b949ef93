"""How much memory training takes: weights, gradients, the optimizer's moments, and what a step keeps for its backward pass.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054, section 3.1) for weights, gradients and moments; Dettmers et al.
2023 (QLoRA, arXiv:2305.14314, sections 2 and 3) for weights in 4 bits; Korthikanti et al. 2022 (arXiv:2205.05198, equations
1 and 2) for activations, whose way of counting is followed here for the layers of today: what autograd keeps of each
operation. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from loratool.estimating.shape import ModelShape, module_input

Method = Literal["lora", "dylora", "adalora"]
Optimizer = Literal["adamw", "adamw-8bit", "adamw-paged", "sgd"]
Attention = Literal["sdpa", "eager"]

MOMENTS: Final[Mapping[Optimizer, int]] = {"adamw": 8, "adamw-8bit": 2, "adamw-paged": 0, "sgd": 0}
"""Bytes of each trained parameter: two moments of fp32; of 8 bits; of fp32 in the host's memory; none."""

DTYPES: Final[Mapping[str, int]] = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK: Final = 64
NESTED_BLOCK: Final = 256

_KEPT_OF_ACTIVATIONS: Final[Mapping[str, int]] = {"relu": 0, "gelu_new": 4, "gelu_fast": 4, "gelu_python": 4}
"""Tensors that autograd keeps of an activation beside its result: one input for most, all steps of one that is written out."""

_LOGIT_BYTES: Final = 12
"""Of each logit at the beginning of the backward pass: the log-softmax in fp32, and two gradients of its size."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that training takes; each attribute is at its largest, and the peak is at most their sum."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass of a step reads, and how.

    Attributes:
        batch_size: rows; those of a batch are padded to one length.
        length: tokens of a row.
        compute: bytes of a number in the type that computes, and in which weights that are not in 4 bits are held.
        attention: ``sdpa``, which keeps no scores, or ``eager``, which does.
        checkpointing: only the input of each layer is kept, and the layer computed again (gradient checkpointing).
    """

    batch_size: int
    length: int
    compute: int = 2
    attention: Attention = "sdpa"
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self.batch_size * self.length


def adapter_parameters(shape: ModelShape, modules: Collection[str], rank: int, *, adalora: bool = False) -> int:
    """Of A (rank, in) and B (out, rank) on each module, ``rank * (in + out)`` (LoRA, arXiv:2106.09685, section 4.1), and of
    AdaLoRA also Lambda, ``rank`` (arXiv:2303.10512, equation 3)."""
    linears = [shape.linears[module] for module in modules]
    return sum(rank * (linear.in_features + linear.out_features + adalora) for linear in linears)


def nf4_bytes(shape: ModelShape) -> int:
    """Of the weights of linear modules in NF4 with double quantization: 4 bits, ``8 / 64`` of a block's scale, and
    ``32 / (64 * 256)`` of a scale of scales (QLoRA, section 3): 4.127 bits a parameter."""
    total = 0
    for linear in shape.linears.values():
        blocks = -(-linear.parameters // BLOCK)
        total += -(-linear.parameters // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK)
    return total


def full_memory(shape: ModelShape, step: Step, optimizer: Optimizer) -> Memory:
    """Full fine-tuning: weights and gradients in the type that computes, moments of every parameter. In 16 bits with AdamW
    12 bytes a parameter (QLoRA, section 1: more than 780 GB for 65 B)."""
    return Memory(
        weights=shape.parameters * step.compute,
        gradients=shape.parameters * step.compute,
        optimizer=shape.parameters * MOMENTS[optimizer],
        activations=activation_bytes(shape, step, None),
    )


def adapter_memory(shape: ModelShape, step: Step, optimizer: Optimizer, modules: Collection[str], rank: int, *,
                   method: Method, adapter_dtype: str, quantized: bool) -> Memory:  # fmt: skip
    """LoRA and its like, or QLoRA where the base is `quantized`: gradients and moments of the adapter alone. AdaLoRA keeps
    two moving averages of each parameter as well (arXiv:2303.10512, equations 9 and 10), counted with the moments."""
    adapter = adapter_parameters(shape, modules, rank, adalora=method == "adalora")
    weights = shape.parameters * step.compute
    decoded = 0
    if quantized:
        weights = (shape.parameters - shape.linear_parameters) * step.compute + nf4_bytes(shape)
        decoded = max(linear.parameters for linear in shape.linears.values()) * step.compute
    width = DTYPES[adapter_dtype]
    averages = 2 * 4 if method == "adalora" else 0
    return Memory(
        weights=weights + adapter * width,
        gradients=adapter * width,
        optimizer=adapter * (MOMENTS[optimizer] + averages),
        activations=activation_bytes(shape, step, dict.fromkeys(modules, rank)) + decoded,
    )


def activation_bytes(shape: ModelShape, step: Step, ranks: Mapping[str, int] | None) -> int:
    """What autograd keeps of one pass: of every layer and of the logits.

    With gradient checkpointing, the input of every layer, and what is larger: one layer computed again (Korthikanti et al.,
    section 5), or the logits, which are gone by then. Of the logits, those of every token are counted; a trainer that
    scores completions alone makes fewer.

    Args:
        ranks: of the modules with an adapter; None for full fine-tuning, which keeps the input of every weight.
    """
    layer = step.tokens * layer_bytes(shape, step, ranks) + step.batch_size * _score_bytes(shape, step)
    layer += step.tokens * step.compute * sum((ranks or {}).values()) // shape.layers  # A x of each adapter
    norm = _norm_bytes(shape, step, is_full=ranks is None) + shape.hidden * step.compute * (ranks is None)
    logits = step.tokens * (norm + shape.vocabulary * _LOGIT_BYTES)
    if step.checkpointing:
        return shape.layers * step.tokens * shape.hidden * step.compute + max(layer, logits)
    return shape.layers * layer + logits


def layer_bytes(shape: ModelShape, step: Step, ranks: Mapping[str, int] | None) -> int:
    """What autograd keeps of one layer for each token, but the attention's scores.

    Of 16-bit GPT layers with dropout that is, with ``_score_bytes``, ``s b h (34 + 5 a s / h)`` (Korthikanti et al., equation
    1), for s tokens, b rows, h the hidden size and a heads. A frozen weight keeps no input, unless an adapter on it does.
    """
    read = None if ranks is None else {module_input(module) for module in ranks}

    def keeps(what: str) -> bool:
        return read is None or what in read

    queries = shape.heads * shape.head_dim
    # sdpa is given keys and values of as many heads as queries where a mask stands for padding.
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
    """Of the intermediate size: what the activation keeps, both factors of a gate, and what the last module reads."""
    kept = _KEPT_OF_ACTIVATIONS.get(shape.activation, 1)
    if shape.gated:
        return shape.intermediate * (kept + 2 + keeps_product)
    # A result that the activation keeps is the same tensor that the last module reads.
    return shape.intermediate * (kept + (keeps_product or kept == 0))


def _norm_bytes(shape: ModelShape, step: Step, *, is_full: bool) -> int:
    """An RMS norm of transformers keeps its input in fp32 and, for its weight's gradient, its result before the weight."""
    if not shape.rms_norms:
        return shape.hidden * step.compute
    return shape.hidden * (4 + step.compute * is_full)


def _score_bytes(shape: ModelShape, step: Step) -> int:
    """Of one row: softmax, and with dropout its mask and result, ``5 a s^2`` bytes in 16 bits. All but GPT-2 make the softmax
    in fp32, and keep it beside its 16-bit copy."""
    if step.attention == "sdpa":
        return 0
    width = step.compute + (step.compute + 1) * shape.dropout
    width += 4 if step.compute < 4 and shape.model_type != "gpt2" else 0
    return shape.heads * step.length**2 * width
