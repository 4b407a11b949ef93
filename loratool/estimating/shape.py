"""The shape of a causal language model, from its configuration alone: modules, parameters, and what its layers are made of.

Needs no torch. The numbers of parameters are those of transformers' own modules of the same configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from loratool.architecture import any_model
from loratool.architecture.layers import Layers
from loratool.architecture.tables import family_of, models_with_layers
from loratool.errors import CheckpointError, UnsupportedError, quoted

MOST: Final[Mapping[str, int]] = {"layers": 4096}
LARGEST: Final = 1 << 24
"""What a number in a configuration may be at most; a hidden size or vocabulary beyond it is a mistake."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module with a weight of `in_features` times `out_features`."""

    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Of its weight."""
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model's shape decides how much memory its training takes.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary: as its configuration has them.
        context: the most tokens that it reads, where it says so.
        gated: a layer's MLP multiplies two products (SwiGLU and its like), else it has an activation alone.
        activation: the MLP's, as transformers calls it.
        rms_norms: a layer's norms are RMS norms, which transformers computes in fp32; else layer norms.
        norms: of a layer, over the hidden size.
        normed_heads: queries and keys have RMS norms of their own.
        dropout: what the layers leave out in training is drawn; the masks are kept.
        linears: every linear module but the output head, by name.
        parameters: of the whole model, those of tied embeddings once.
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
        """Of the weights of linear modules, which is what NF4 stores in 4 bits."""
        return sum(linear.parameters for linear in self.linears.values())

    def stored_as(self, linears: Mapping[str, Linear], parameters: int) -> ModelShape:
        """The same with the modules and the number of parameters that a checkpoint has."""
        return replace(self, linears=linears, parameters=parameters)


def module_input(name: str) -> str | None:
    """Return what the module called `name` reads, such as ``attention input``; None if it stands at no known part of a layer."""
    return any_model().reads(f"{name}.weight")


def read_shape(config: Mapping[str, Any], source: str) -> ModelShape:
    """Return the shape of a model with this ``config.json``.

    Args:
        source: where it comes from, for errors.

    Raises:
        UnsupportedError: the layers of its ``model_type`` are not known.
        CheckpointError: a number is missing or impossible.
    """
    nested = config.get("text_config")
    numbers = _Numbers(nested if isinstance(nested, Mapping) else config, source)
    model_type = numbers.content.get("model_type", config.get("model_type"))
    family = family_of(model_type) if isinstance(model_type, str) else None
    if family is None or family.layers is None:
        raise UnsupportedError(
            f"{quoted(source)} is a model of type {quoted(model_type)}, whose modules are not known; known are "
            f"{', '.join(models_with_layers())}"
        )
    build = _BUILDERS[family.layers.like]
    return build(numbers, _Kind(str(model_type), bool(family.tie_word_embeddings), family.layers))


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is known of a type of model beside its configuration. `tied`: it ties its embeddings where that says nothing."""

    model_type: str
    tied: bool
    layers: Layers


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of a configuration, checked; each method raises CheckpointError for one that cannot be."""

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
                f"the configuration of {quoted(self.source)} has {quoted(key)} {quoted(value, 40)}, which is no whole number of "
                f"1 to {most:,}; mend it"
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
        """Whether one of these is a number above zero."""
        values = [self.content.get(key) for key in keys]
        return any(isinstance(value, int | float) and value > 0 for value in values)

    def heads(self, key: str, hidden: int) -> tuple[int, int]:
        """How many heads there are, and how wide each is."""
        heads = self.whole(key)
        if self.content.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"the configuration of {quoted(self.source)} has {heads:,} heads, which do not divide its hidden size of "
                f"{hidden:,}; mend it"
            )
        return heads, self.whole("head_dim", hidden // heads or 1)


def _llama(numbers: _Numbers, kind: _Kind) -> ModelShape:
    """Return the shape of Llama, and of models that differ from it in biases, norms and tied embeddings alone."""
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
    return _of_layer_norms(
        numbers,
        kind,
        hidden=hidden,
        layers=numbers.whole("n_layer", most=MOST["layers"]),
        heads="n_head",
        inner=inner,
        context=numbers.whole("n_positions"),
        prefix="transformer.h",
        layer=layer,
        activation=numbers.word("activation_function", default=kind.layers.activation),
        dropout=numbers.positive("resid_pdrop", "attn_pdrop"),
    )


def _opt(numbers: _Numbers, kind: _Kind) -> ModelShape:
    hidden, inner = numbers.whole("hidden_size"), numbers.whole("ffn_dim")
    width = numbers.whole("word_embed_proj_dim", hidden)
    layer = {
        **{f"self_attn.{name}": Linear(hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")},
        "fc1": Linear(hidden, inner),
        "fc2": Linear(inner, hidden),
    }
    outer = {"project_in": Linear(width, hidden), "project_out": Linear(hidden, width)} if width != hidden else {}
    is_normed = numbers.flag("do_layer_norm_before", True) and not numbers.flag("_remove_final_layer_norm", False)
    context = numbers.whole("max_position_embeddings")
    return _of_layer_norms(
        numbers,
        kind,
        hidden=hidden,
        layers=numbers.whole("num_hidden_layers", most=MOST["layers"]),
        heads="num_attention_heads",
        inner=inner,
        context=context,
        prefix="model.decoder.layers",
        layer=layer,
        activation=numbers.word("activation_function", default=kind.layers.activation),
        dropout=numbers.positive("dropout", "attention_dropout"),
        embedded=width,
        outer={f"model.decoder.{name}": linear for name, linear in outer.items()},
        final_norm=is_normed,
        positions=context + 2,
    )


def _gpt_neox(numbers: _Numbers, kind: _Kind) -> ModelShape:
    hidden, inner = numbers.whole("hidden_size"), numbers.whole("intermediate_size")
    layer = {
        "attention.query_key_value": Linear(hidden, 3 * hidden),
        "attention.dense": Linear(hidden, hidden),
        "mlp.dense_h_to_4h": Linear(hidden, inner),
        "mlp.dense_4h_to_h": Linear(inner, hidden),
    }
    return _of_layer_norms(
        numbers,
        kind,
        hidden=hidden,
        layers=numbers.whole("num_hidden_layers", most=MOST["layers"]),
        heads="num_attention_heads",
        inner=inner,
        context=numbers.whole("max_position_embeddings"),
        prefix="gpt_neox.layers",
        layer=layer,
        activation=numbers.word("hidden_act", default=kind.layers.activation),
        dropout=numbers.positive("hidden_dropout", "attention_dropout"),
        positions=0,
    )


def _of_layer_norms(numbers: _Numbers, kind: _Kind, *, hidden: int, layers: int, heads: str, inner: int, context: int,
                    prefix: str, layer: Mapping[str, Linear], activation: str, dropout: bool,
                    embedded: int | None = None, outer: Mapping[str, Linear] | None = None, final_norm: bool = True,
                    positions: int | None = None) -> ModelShape:  # fmt: skip
    """A model with biases everywhere, layer norms and an MLP of two linear modules."""
    vocabulary = numbers.whole("vocab_size")
    count, head_dim = numbers.heads(heads, hidden)
    linears = {**dict(_repeated(prefix, layers, layer)), **(outer or {})}
    biases = layers * sum(linear.out_features for linear in layer.values())
    tables = vocabulary * (embedded or hidden) * (1 if numbers.flag("tie_word_embeddings", kind.tied) else 2)
    tables += (context if positions is None else positions) * hidden
    norms = 2 * hidden * (2 * layers + final_norm)
    return ModelShape(
        model_type=kind.model_type,
        hidden=hidden,
        layers=layers,
        heads=count,
        kv_heads=count,
        head_dim=head_dim,
        intermediate=inner,
        vocabulary=vocabulary,
        context=context,
        gated=False,
        activation=activation,
        rms_norms=False,
        norms=2,
        normed_heads=False,
        dropout=dropout,
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
"""By whose layers a model has."""
