"""The shape of a causal language model from its configuration alone: modules, parameters, and the makeup of its layers.

Needs no torch. Parameter counts equal those of the modules that transformers builds from the same configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from loratool.architecture import any_model
from loratool.architecture.layers import Layers
from loratool.architecture.tables import family_of, models_with_layers
from loratool.errors import CheckpointError, UnsupportedError, quoted

MOST: Final[Mapping[str, int]] = {"layers": 4096}
LARGEST: Final = 1 << 24
"""The largest number accepted in a configuration; a larger hidden size or vocabulary is a mistake."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module, whose weight has `in_features` times `out_features` elements."""

    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Number of elements in its weight."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The parts of a model's shape that decide how much memory its training takes.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary: the sizes in its configuration.
        context: the most tokens it reads at once, or None if its configuration names no limit.
        gated: True if each MLP multiplies two products (such as SwiGLU), False if it only applies an activation.
        activation: the MLP's activation, by transformers' name.
        rms_norms: True if the norms of a layer are RMS norms, which transformers computes in fp32; False for layer norms.
        norms: number of norms in a layer that span the hidden size.
        normed_heads: True if queries and keys have RMS norms of their own.
        dropout: True if the layers apply dropout in training, whose masks autograd keeps.
        linears: every linear module except the output head, by name.
        parameters: number of parameters of the whole model; tied embeddings count once.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int | None
    gated: bool
    activation: str
    rms_norms: bool
    norms: int
    normed_heads: bool
    dropout: bool
    linears: Mapping[str, Linear]
    parameters: int

    @property
    def linear_parameters(self) -> int:
        """Number of parameters in the weights of linear modules: the ones that NF4 stores in 4 bits."""
        return sum(linear.parameters for linear in self.linears.values())

    def stored_as(self, linears: Mapping[str, Linear], parameters: int) -> ModelShape:
        """Return this shape with the linear modules and parameter count of a checkpoint."""
        return replace(self, linears=linears, parameters=parameters)


def module_input(name: str) -> str | None:
    """Return what the module called `name` reads, such as ``attention input``, or None if its name is not a known one."""
    return any_model().reads(f"{name}.weight")


def read_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """Return the shape of the model that a ``config.json`` describes.

    Args:
        config: the parsed ``config.json``.
        source: where the configuration comes from, for error messages.

    Raises:
        UnsupportedError: the layers of its ``model_type`` are not known.
        CheckpointError: a number is missing or invalid.
    """
    nested = config.get("text_config")
    numbers = _Numbers(nested if isinstance(nested, Mapping) else config, source)
    model_type = numbers.content.get("model_type", config.get("model_type"))
    family = family_of(model_type) if isinstance(model_type, str) else None
    if family is None or family.layers is None:
        raise UnsupportedError(
            f"{quoted(source)} is a model of type {quoted(model_type)}, whose modules are not known; known types are "
            f"{', '.join(models_with_layers())}"
        )
    build = _BUILDERS[family.layers.like]
    return build(numbers, _Kind(str(model_type), bool(family.tie_word_embeddings), family.layers))


@dataclass(frozen=True, slots=True)
class _Kind:
    """Facts about a model type that its configuration may leave out.

    Attributes:
        tied: whether embeddings are tied if the configuration does not say.
    """

    model_type: str
    tied: bool
    layers: Layers


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The values of a configuration. Each method raises CheckpointError if a value is invalid."""

    content: Mapping[str, Any]
    source: str

    def whole(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        value = self.content.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"the configuration of {quoted(self.source)} has no {quoted(key)}; complete it")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointError(
                f"the configuration of {quoted(self.source)} has {quoted(key)} {quoted(value, 40)}, which is not a whole number "
                f"from 1 to {most:,}; fix it"
            )
        return value

    def optional(self, key: str) -> int | None:
        return self.whole(key) if self.content.get(key) is not None else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.content.get(key)
        return value if isinstance(value, bool) else default

    def word(self, *keys: str, default: str) -> str:
        return next((value for key in keys if isinstance(value := self.content.get(key), str)), default)

    def positive(self, *keys: str) -> bool:
        """Return whether any of these keys has a value above zero."""
        values = [self.content.get(key) for key in keys]
        return any(isinstance(value, int | float) and value > 0 for value in values)

    def heads(self, key: str, hidden: int) -> tuple[int, int]:
        """Return the number of heads and the width of each."""
        heads = self.whole(key)
        if self.content.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"the configuration of {quoted(self.source)} has {heads:,} heads, which do not divide its hidden size of "
                f"{hidden:,}; fix it"
            )
        return heads, self.whole("head_dim", hidden // heads or 1)


def _llama(numbers: _Numbers, kind: _Kind) -> ModelShape:
    """Return the shape of Llama or of a model that differs from it only in biases, norms and tied embeddings."""
    made = kind.layers
    hidden, layers = numbers.whole("hidden_size"), numbers.whole("num_hidden_layers", most=MOST["layers"])
    heads, head_dim = numbers.heads("num_attention_heads", hidden)
    kv_heads = numbers.whole("num_key_value_heads", heads)
    inner, vocabulary = numbers.whole("intermediate_size"), numbers.whole("vocab_size")
    queries, keys = heads * head_dim, kv_heads * head_dim
    bias, mlp_bias = numbers.flag("attention_bias", False), numbers.flag("mlp_bias", False)
    biases = (queries + 2 * keys) * (bias or made.qkv_bias) + hidden * bias + (2 * inner + hidden) * mlp_bias
    widths = {"": 0, "of a head": 2 * head_dim, "of all heads": queries + keys}
    layer = {
        "self_attn.q_proj": Linear(hidden, queries),
        "self_attn.k_proj": Linear(hidden, keys),
        "self_attn.v_proj": Linear(hidden, keys),
        "self_attn.o_proj": Linear(queries, hidden),
        "mlp.gate_proj": Linear(hidden, inner),
        "mlp.up_proj": Linear(hidden, inner),
        "mlp.down_proj": Linear(inner, hidden),
    }
    if made.fused:
        layer = {
            "self_attn.qkv_proj": Linear(hidden, queries + 2 * keys),
            "self_attn.o_proj": Linear(queries, hidden),
            "mlp.gate_up_proj": Linear(hidden, 2 * inner),
            "mlp.down_proj": Linear(inner, hidden),
        }
    linears = dict(_repeated("model.layers", layers, layer))
    embeddings = vocabulary * hidden * (1 if numbers.flag("tie_word_embeddings", kind.tied) else 2)
    others = layers * (biases + made.norms * hidden + widths[made.head_norms]) + hidden
    return ModelShape(
        model_type=kind.model_type,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocabulary=vocabulary,
        context=numbers.optional("max_position_embeddings"),
        gated=True,
        activation=numbers.word("hidden_activation", "hidden_act", default=made.activation),
        rms_norms=True,
        norms=made.norms,
        normed_heads=bool(made.head_norms),
        dropout=numbers.positive("attention_dropout"),
        linears=linears,
        parameters=sum(linear.parameters for linear in linears.values()) + embeddings + others,
    )


def _gpt2(numbers: _Numbers, kind: _Kind) -> ModelShape:
    hidden = numbers.whole("n_embd")
    inner = numbers.whole("n_inner", 4 * hidden)
    layer = {
        "attn.c_attn": Linear(hidden, 3 * hidden),
        "attn.c_proj": Linear(hidden, hidden),
        "mlp.c_fc": Linear(hidden, inner),
        "mlp.c_proj": Linear(inner, hidden),
    }
    block = _Block(
        linears=layer,
        heads=numbers.heads("n_head", hidden),
        intermediate=inner,
        activation=numbers.word("activation_function", default=kind.layers.activation),
        dropout=numbers.positive("resid_pdrop", "attn_pdrop"),
    )
    layers = numbers.whole("n_layer", most=MOST["layers"])
    context = numbers.whole("n_positions")
    outside = _Outside(context=context, positions=context, embedded=hidden)
    return _layer_normed(numbers, kind, hidden, _Stack("transformer.h", layers, block), outside)


def _opt(numbers: _Numbers, kind: _Kind) -> ModelShape:
    hidden, inner = numbers.whole("hidden_size"), numbers.whole("ffn_dim")
    width = numbers.whole("word_embed_proj_dim", hidden)
    layer = {
        **{f"self_attn.{name}": Linear(hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")},
        "fc1": Linear(hidden, inner),
        "fc2": Linear(inner, hidden),
    }
    block = _Block(
        linears=layer,
        heads=numbers.heads("num_attention_heads", hidden),
        intermediate=inner,
        activation=numbers.word("activation_function", default=kind.layers.activation),
        dropout=numbers.positive("dropout", "attention_dropout"),
    )
    layers = numbers.whole("num_hidden_layers", most=MOST["layers"])
    projections = {"project_in": Linear(width, hidden), "project_out": Linear(hidden, width)} if width != hidden else {}
    context = numbers.whole("max_position_embeddings")
    outside = _Outside(
        context=context,
        positions=context + 2,
        embedded=width,
        linears={f"model.decoder.{name}": linear for name, linear in projections.items()},
        final_norm=numbers.flag("do_layer_norm_before", True) and not numbers.flag("_remove_final_layer_norm", False),
    )
    return _layer_normed(numbers, kind, hidden, _Stack("model.decoder.layers", layers, block), outside)


def _gpt_neox(numbers: _Numbers, kind: _Kind) -> ModelShape:
    hidden, inner = numbers.whole("hidden_size"), numbers.whole("intermediate_size")
    layer = {
        "attention.query_key_value": Linear(hidden, 3 * hidden),
        "attention.dense": Linear(hidden, hidden),
        "mlp.dense_h_to_4h": Linear(hidden, inner),
        "mlp.dense_4h_to_h": Linear(inner, hidden),
    }
    block = _Block(
        linears=layer,
        heads=numbers.heads("num_attention_heads", hidden),
        intermediate=inner,
        activation=numbers.word("hidden_act", default=kind.layers.activation),
        dropout=numbers.positive("hidden_dropout", "attention_dropout"),
    )
    layers = numbers.whole("num_hidden_layers", most=MOST["layers"])
    outside = _Outside(context=numbers.whole("max_position_embeddings"), positions=0, embedded=hidden)
    return _layer_normed(numbers, kind, hidden, _Stack("gpt_neox.layers", layers, block), outside)


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer: its linear modules by name, its number of heads and their width, and its MLP."""

    linears: Mapping[str, Linear]
    heads: tuple[int, int]
    intermediate: int
    activation: str
    dropout: bool


@dataclass(frozen=True, slots=True)
class _Stack:
    """`count` equal layers, whose modules are named ``prefix.number.name``."""

    prefix: str
    count: int
    block: _Block


@dataclass(frozen=True, slots=True)
class _Outside:
    """The parts of a model outside its layers.

    Attributes:
        context: the most tokens it reads at once.
        positions: rows in its table of learned positions; 0 if it has none.
        embedded: width of the token embeddings.
        linears: linear modules except the output head, by name.
        final_norm: whether a layer norm follows the last layer.
    """

    context: int
    positions: int
    embedded: int
    linears: Mapping[str, Linear] = field(default_factory=dict)
    final_norm: bool = True


def _layer_normed(numbers: _Numbers, kind: _Kind, hidden: int, stack: _Stack, outside: _Outside) -> ModelShape:
    """Return the shape of a model with biases everywhere, layer norms, and MLPs of two linear modules."""
    block, vocabulary = stack.block, numbers.whole("vocab_size")
    heads, head_dim = block.heads
    linears = {**dict(_repeated(stack.prefix, stack.count, block.linears)), **outside.linears}
    biases = stack.count * sum(linear.out_features for linear in block.linears.values())
    tables = vocabulary * outside.embedded * (1 if numbers.flag("tie_word_embeddings", kind.tied) else 2)
    tables += outside.positions * hidden
    norms = 2 * hidden * (2 * stack.count + outside.final_norm)
    return ModelShape(
        model_type=kind.model_type,
        hidden=hidden,
        layers=stack.count,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=block.intermediate,
        vocabulary=vocabulary,
        context=outside.context,
        gated=False,
        activation=block.activation,
        rms_norms=False,
        norms=2,
        normed_heads=False,
        dropout=block.dropout,
        linears=linears,
        parameters=sum(linear.parameters for linear in linears.values()) + biases + tables + norms,
    )


def _repeated(prefix: str, layers: int, layer: Mapping[str, Linear]) -> Iterator[tuple[str, Linear]]:
    for number in range(layers):
        for name, linear in layer.items():
            yield f"{prefix}.{number}.{name}", linear


_BUILDERS: Final[Mapping[str, Callable[[_Numbers, _Kind], ModelShape]]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}
"""Builders of a shape, by the model whose layers it has (`Layers.like`)."""
