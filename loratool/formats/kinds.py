"""The table of adapter kinds: their names, how their tensors are recognized, and whether loratool computes them.

One row for each kind. Kinds that are not computed are catalogued too, but every command that needs their numbers refuses them
with the row's reason. The names and tensors are those of PEFT 0.21 and LyCORIS 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

NOT_YET: Final = (
    "loratool does not compute it yet; merge it with the program that trained it (in PEFT, merge_and_unload)"
)
BESIDE: Final = (
    "it changes no weights, so nothing can be merged; keep it beside its base, and load it with its own program"
)
BY_INPUT: Final = (
    "its update depends on each input, so merged weights cannot replace it; keep it beside its base, and load it with the "
    "program that trained it"
)
UNDEFINED: Final = "its merge is not defined, not even in PEFT; keep it beside its base, and load it with PEFT"
BY_BASE: Final = (
    "it is relative to a decomposition of its base that other machines cannot reproduce; save it as a LoRA with the program "
    "that trained it"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter.

    Attributes:
        name: the catalogue's word.
        title: its name for people.
        peft_type: PEFT's word in a configuration; None for a variant of another type, or a kind that PEFT does not have.
        setting: the key of a LoRA's configuration that makes it this variant.
        parts: beginnings of its tensors' names after the module's name, in PEFT.
        other_parts: the same in other programs, if they differ.
        ranks: parts whose shape shows the rank, each with the axis; the first part that a module has counts.
        why_not: why it is not computed, and what to do; None if it is, and `formats.builders` has its row.
        keys: configuration keys that it adds to those of every type (`formats.module_targets`), or to LoRA's.
        nested: whether it acts at every rank up to its own.
        recorded: whether its files are a LoRA's and only loratool's facts beside them name the kind.
        article: the English article of its title.
        advice: advice for people who have one.
        alpha_key: the key of alpha in its PEFT configuration, which may lack it.
        accompanies: whether its tensors may stand beside those of another kind without making a mixture.
        in_lycoris: whether LyCORIS names its tensors as PEFT does, and stores an alpha for each module.
        indices: the letters of its tensors that hold whole numbers.
    """

    name: str
    title: str
    peft_type: str | None = None
    setting: str | None = None
    parts: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    why_not: str | None = None
    other_parts: tuple[str, ...] = ()
    keys: frozenset[str] = frozenset()
    nested: bool = False
    recorded: bool = False
    article: str = "a"
    advice: str = ""
    alpha_key: str = "lora_alpha"
    accompanies: bool = False
    in_lycoris: bool = False
    indices: frozenset[str] = frozenset()

    @property
    def is_lora(self) -> bool:
        """Whether its factors are a LoRA's."""
        return self.ranks[:1] == _LORA_RANKS[:1]


LORA: Final = "lora"
NESTED_LORA: Final = "dylora"
_LORA_RANKS: Final = (
    ("lora_A", 0), ("lora_embedding_A", 0), ("lora_down", 0), ("lora_a", 0),
)  # fmt: skip

_LYCORIS: Final = frozenset({"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})
"""Keys that PEFT's types from LyCORIS share."""

_PROJECTED: Final = frozenset({"r", "projection_prng_key", "save_projection", "fan_in_fan_out", "bias", "init_weights"})
"""Keys of PEFT's types whose modules share random projections."""

_ROWS: Final = (
    # Low rank
    Kind("adalora", "AdaLoRA", "ADALORA", parts=("lora_E", "ranknum"), ranks=(("lora_A", 0),), article="an",
         keys=frozenset({"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
                         "rank_pattern"}),
         advice="PEFT loads it. For engines that load only LoRA, convert it with `loratool prune --as lora`."),
    Kind(NESTED_LORA, "DyLoRA", ranks=_LORA_RANKS, nested=True, recorded=True, advice=(
        "Its leading components work on their own: it can be cut to any rank up to its own without training. "
        "PEFT and serving engines load it at its full rank.")),
    Kind("dora", "DoRA", None, "use_dora", ("lora_magnitude_vector",), _LORA_RANKS,
         other_parts=("magnitude", "dora_scale")),
    Kind("kasa", "KaSA", None, "kasa_config", ("lora_diag",), _LORA_RANKS, BY_BASE),
    Kind("qalora", "QALoRA", None, "use_qalora", (), _LORA_RANKS, UNDEFINED),
    Kind("bdlora", "BD-LoRA", None, "use_bdlora", (), _LORA_RANKS),
    Kind("alora", "aLoRA", None, "alora_invocation_tokens", (), _LORA_RANKS, BY_INPUT),
    Kind("arrow", "Arrow", None, "arrow_config", (), _LORA_RANKS, BY_INPUT),
    Kind("tlora", "T-LoRA", other_parts=("q_layer", "p_layer", "lambda_layer"), why_not=BY_INPUT),
    Kind("xlora", "X-LoRA", "XLORA", parts=("xlora_", "internal_xlora_"), why_not=BY_INPUT),
    Kind("poly", "Poly", "POLY", parts=("poly_",), why_not=BY_INPUT),
    Kind("lily", "Lily", "LILY", parts=("lily_",), ranks=(("lily_A", 0),), why_not=BY_INPUT),
    Kind("shadow", "Shadow", "SHADOW", parts=("shadow_",), ranks=(("shadow_down", 0),), why_not=BY_INPUT,
         alpha_key="shadow_alpha"),
    Kind("gralora", "GraLoRA", "GRALORA", parts=("gralora_",), ranks=(("gralora_A", 2),), alpha_key="alpha",
         keys=frozenset({"hybrid_r", "gralora_dropout", "gralora_k", "fan_in_fan_out", "bias", "init_weights"})),
    Kind("delora", "DeLoRA", "DELORA", parts=("delora_",), ranks=(("delora_A", 0),),
         keys=frozenset({"r", "rank_pattern", "delora_lambda", "lambda_pattern", "module_dropout", "bias", "init_weights"})),
    Kind("hira", "HiRA", "HIRA", parts=("hira_",), ranks=(("hira_A", 0), ("hira_embedding_A", 0)),
         keys=frozenset({"r", "rank_pattern", "hira_dropout", "fan_in_fan_out", "init_weights"})),
    Kind("vera", "VeRA", "VERA", parts=("vera_",), ranks=(("vera_lambda_d", 0),),
         keys=_PROJECTED | {"vera_dropout", "d_initial"}),
    Kind("pvera", "PVeRA", "PVERA", parts=("pvera_",), ranks=(),
         keys=_PROJECTED | {"pvera_dropout", "d_initial", "sample_at_inference", "generator_seed"}),
    Kind("vblora", "VB-LoRA", "VBLORA", parts=("vblora_",), ranks=(("vblora_logits_A", 0), ("vblora_logits_A_topk_indices", 0)),
         indices=frozenset({"indices_A", "indices_B"}),
         keys=frozenset({"r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout",
                         "fan_in_fan_out", "bias", "init_vector_bank_bound", "init_logits_std"})),
    Kind("unilora", "UniLoRA", "UNILORA", parts=("unilora_",), ranks=(("unilora_indices_A", 0),),
         indices=frozenset({"indices_A", "indices_B"}),
         keys=frozenset({"r", "proj_seed", "theta_d_length", "unilora_dropout", "fan_in_fan_out", "bias", "init_theta_d_bound",
                         "init_weights", "save_indices"})),
    Kind("tinylora", "TinyLoRA", "TINYLORA", parts=("tinylora_",), ranks=(("tinylora_A", 0),),
         keys=frozenset({"r", "u", "weight_tying", "projection_seed", "save_projection", "init_v_bound", "tinylora_dropout",
                         "fan_in_fan_out", "bias", "init_weights"})),
    Kind("randlora", "RandLoRA", "RANDLORA", parts=("randlora_",), ranks=(("randlora_lambda", 0),), alpha_key="randlora_alpha",
         keys=_PROJECTED | {"sparse", "very_sparse", "randlora_dropout"}),
    Kind("peanut", "PEANuT", "PEANUT", parts=("peanut_",), ranks=(("peanut_A", 0),), why_not=NOT_YET),
    Kind("deft", "DEFT", "DEFT", parts=("deft_",), ranks=(("deft_R", 0),), why_not=NOT_YET, alpha_key="alpha"),
    Kind("adamss", "AdaMSS", "ADAMSS", parts=("adamss_",), why_not=BY_BASE),
    Kind("psoft", "PSOFT", "PSOFT", parts=("psoft_",), ranks=(("psoft_R.vector_a", 0),), why_not=BY_BASE,
         alpha_key="psoft_alpha"),
    Kind("osf", "OSF", "OSF", parts=("osf_svd_params", "osf_"), why_not=BY_BASE),
    Kind("frod", "FRoD", "FROD", parts=("frod_",), why_not=BY_BASE),
    # Products and other sums
    Kind("loha", "LoHa", "LOHA", parts=("hada_",), ranks=(("hada_w1_b", 0),), keys=_LYCORIS, alpha_key="alpha", in_lycoris=True),
    Kind("lokr", "LoKr", "LOKR", parts=("lokr_",), ranks=(("lokr_w2_b", 0), ("lokr_w1_b", 0)), alpha_key="alpha",
         keys=_LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"}, in_lycoris=True),
    Kind("glora", "GLoRA", "GLORA", parts=("glora_",), ranks=(("a2", 0), ("glora_A.Xu", 0)),
         keys=frozenset({"r", "bias", "config_A_B", "config_C", "config_D_E", "init_weights"}),
         other_parts=("a1", "a2", "b1", "b2")),
    Kind("miss", "MiSS", "MISS", parts=("miss_",), keys=frozenset({"r", "mini_r", "miss_dropout", "init_weights", "bias"})),
    Kind("fourierft", "FourierFT", "FOURIERFT", parts=("fourierft_",),
         keys=frozenset({"n_frequency", "scaling", "random_loc_seed", "fan_in_fan_out", "bias", "n_frequency_pattern",
                         "init_weights"})),
    Kind("waveft", "WaveFT", "WAVEFT", parts=("waveft_",),
         keys=frozenset({"n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed", "fan_in_fan_out", "bias",
                         "n_frequency_pattern", "proportional_parameters", "init_weights"})),
    Kind("c3a", "C3A", "C3A", parts=("c3a_",), keys=frozenset({"block_size", "bias", "block_size_pattern", "init_weights"})),
    Kind("shira", "SHiRA", "SHIRA", parts=("shira_",), indices=frozenset({"indices"}),
         keys=frozenset({"r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"})),
    Kind("supertuning", "Supertuning", "SUPERTUNING", parts=("supertuning_",), ranks=(("supertuning_lora_A", 0),),
         keys=frozenset({"sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "init_weights",
                         "save_precomputed_indices"}), indices=frozenset({"indices"})),
    # Factors and rotations
    Kind("ia3", "IA3", "IA3", parts=("ia3_",), other_parts=("on_input",), article="an",
         keys=frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})),
    Kind("oft", "OFT", "OFT", parts=("oft_",), article="an",
         keys=frozenset({"r", "oft_block_size", "module_dropout", "fan_in_fan_out", "bias", "init_weights", "coft", "eps",
                         "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"})),
    Kind("boft", "BOFT", "BOFT", parts=("boft_",),
         keys=frozenset({"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "fan_in_fan_out", "bias",
                         "init_weights"})),
    Kind("hra", "HRA", "HRA", parts=("hra_",), ranks=(("hra_u", 1),), article="an",
         keys=frozenset({"r", "apply_GS", "init_weights", "bias"})),
    Kind("road", "RoAd", "ROAD", parts=("road_",), keys=frozenset({"variant", "group_size", "init_weights"})),
    # Parts of the base itself
    Kind("ln_tuning", "tuned layer norms", "LN_TUNING", parts=("ln_tuning_",), accompanies=True),
    Kind("beft", "BEFT", "BEFT", parts=("beft_",), keys=frozenset({"init_weights"})),
    Kind("bitfit", "trained biases and norms"),
    Kind("trainable_tokens", "trainable tokens", "TRAINABLE_TOKENS", parts=("trainable_tokens_", "token_adapter"),
         keys=frozenset({"token_indices", "init_weights"}), accompanies=True),
    Kind("full", "full weights", why_not=NOT_YET, other_parts=("diff", "set_weight", "w_norm", "b_norm"), accompanies=True),
    # Added layers and tokens
    Kind("prompt_tuning", "prompt tuning", "PROMPT_TUNING", parts=("prompt_embeddings",), why_not=BESIDE),
    Kind("multitask_prompt_tuning", "multitask prompt tuning", "MULTITASK_PROMPT_TUNING",
         parts=("prompt_embeddings", "prefix_task_"), why_not=BESIDE),
    Kind("p_tuning", "P-tuning", "P_TUNING", parts=("prompt_embeddings",), why_not=BESIDE),
    Kind("prefix_tuning", "prefix tuning", "PREFIX_TUNING", parts=("prompt_embeddings",), why_not=BESIDE),
    Kind("cpt", "CPT", "CPT", parts=("prompt_embeddings",), why_not=BESIDE),
    Kind("cartridge", "Cartridge", "CARTRIDGE", parts=("prompt_embeddings",), why_not=BESIDE),
    Kind("adaption_prompt", "adaption prompt", "ADAPTION_PROMPT", parts=("adaption_",), why_not=BESIDE),
    Kind("bottleneck", "bottleneck adapter", other_parts=("adapter_down", "adapter_up"), why_not=(
        "its layers are not linear, so no weights of the base can hold them; keep it beside its base, and load it with the "
        "adapters library")),
    Kind("mixed", "a mixture of kinds", why_not=NOT_YET),
    Kind(LORA, "LoRA", "LORA", parts=("lora_",), ranks=_LORA_RANKS),
)  # fmt: skip

KINDS: Final[Mapping[str, Kind]] = MappingProxyType({kind.name: kind for kind in _ROWS})
"""Every kind by name; a variant precedes the kind that it varies."""

OF_PEFT: Final[Mapping[str, Kind]] = MappingProxyType({kind.peft_type: kind for kind in _ROWS if kind.peft_type})
COMPUTED: Final = frozenset(kind.name for kind in _ROWS if kind.why_not is None)
RECORDED: Final = tuple(kind for kind in _ROWS if kind.recorded)
VARIANTS: Final = tuple(kind for kind in _ROWS if kind.setting is not None)
NEVER_ALONE: Final = tuple(kind.name for kind in _ROWS if kind.accompanies)


@dataclass(frozen=True, slots=True)
class Feature:
    """A feature that a LoRA may have beside the factors of linear layers, and that loratool does not compute yet.

    Attributes:
        title: its name for people, with PEFT's word for it.
        setting: the key of the configuration that asks for it.
        parts: beginnings of its tensors' names after the module's name.
        why_not: why it is not computed, and what to do.
    """

    title: str
    setting: str | None = None
    parts: tuple[str, ...] = ()
    why_not: str = NOT_YET


FEATURES: Final = (
    Feature("layer_replication", "layer_replication", why_not=(
        "it repeats these ranges of its base's layers, one after the other; make that larger model first (a passthrough merge of "
        "mergekit, with a slice for each range), remove layer_replication from the configuration, and merge into that")),
    Feature("Megatron layers (megatron_config)", "megatron_config"),
)  # fmt: skip
"""Features in the order in which messages name them: the greatest obstacle first."""


def kind_named(name: str) -> Kind:
    """Return the row of a kind; for a kind that only a later loratool or PEFT knows, return a row that says so."""
    return KINDS.get(name) or Kind(name, name, why_not=f"this loratool does not know it; {NOT_YET.partition('; ')[2]}")
