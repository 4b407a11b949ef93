"""Which matrices of a model are the weights of linear modules that transformers stores in 4 bits.

transformers replaces every linear module except the output head, modules tied to it and the model's last module
(``get_keys_to_not_convert``). It asks the modules; here the names of the tensors and ``config.json`` tell, so that no model
is built. Compared with the modules of all causal, sequence-to-sequence and classification models of transformers 5.23, the
names tell the same but for the model types of `UNLIKE` and the classes of `UNLIKE_CLASSES`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import UnsupportedError, quoted
from loratool.formats.names import SUFFIX

EMBEDDING: Final = re.compile(
    r"wte|wpe|shared|relative_attention_bias|(\w+_)?(embed|emb|embeddings?|embeds)(_(tokens|positions|in|tokens_per_layer|\w+_tokens))?"
)
"""The last components of the names of embeddings."""

HEAD: Final = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|lm_head\.out_proj|embed_out|predictions\.decoder|head\.attention\.out_proj)"
    r"|score|proj_out|output|output_projection|head|decoder|generator_lm_head|lm_loss"
)
"""The names of output heads; those that other modules have as well only at the top of a model."""

SCORE: Final = "score"
"""The head of classifying models. transformers keeps it for its place, the last one, but takes the name of the last parameter
for that of the last module: one with a bias, as for classes of tokens, is stored in 4 bits."""

ROUTED: Final = re.compile(r"((?:.*\.)?(?:experts|router|gate))(?:\..*)?")
"""Experts and what chooses them: modules of their own kind, not linear ones, in transformers 5."""

T5_TYPES: Final = frozenset({"t5", "mt5", "umt5"})
"""Model types that keep the modules called ``wo`` in fp32."""

UNLIKE: Final = frozenset({
    "afmoe", "aimv2", "altclip", "axk2", "blip-2", "canine", "chinese_clip", "clip", "clipseg", "ctrl", "deepseek_v32",
    "deepseek_v4", "dia", "falcon", "fsmt", "fuyu", "gemma3n", "gemma3n_text", "glm_moe_dsa", "ibert", "instructblip",
    "instructblipvideo", "jetmoe", "kosmos-2.5", "lilt", "longcat_flash", "markuplm", "metaclip_2", "nllb-moe", "ovis2", "owlv2",
    "owlvit", "pegasus_x", "phi4_multimodal", "pix2struct", "pop2piano", "prophetnet", "switch_transformers", "tapas", "udop",
    "voxtral_realtime", "xlm", "zamba", "zamba2", "zaya",
})  # fmt: skip
"""Model types whose linear modules cannot be told by their names."""

UNLIKE_CLASSES: Final = ("ForCTC", "OlmoModel")
"""How the names of classes end whose linear modules cannot be told either."""

CONV1D_TYPES: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_LEAVES: Final = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def linear_weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the weights of linear modules that are stored in 4 bits, sorted.

    Raises:
        UnsupportedError: the names of this type of model do not tell.
    """
    model_type, classes = _model_type(config), config.get("architectures")
    unlike = [name for name in classes if str(name).endswith(UNLIKE_CLASSES)] if isinstance(classes, list) else []
    if model_type in UNLIKE or unlike:
        raise UnsupportedError(
            f"the names of a {quoted(unlike[0] if unlike else model_type)} model do not tell which of its modules are stored in "
            "4 bits; quantize it with transformers and bitsandbytes"
        )
    keeps_wo = model_type in T5_TYPES
    return tuple(
        name
        for name in sorted(tensors)
        if _is_linear(name, tensors) and not (keeps_wo and name.endswith(".wo" + SUFFIX))
    )


def skipped_modules(tensors: Collection[str]) -> list[str] | None:
    """What ``llm_int8_skip_modules`` of a quantization_config must say; None where transformers' own choice is the same.

    Versions of transformers before 5 take experts for linear modules unless they are named.
    """
    modules = [name.removesuffix(SUFFIX) for name in tensors if name.endswith(SUFFIX)]
    routed = {found[1] for found in map(ROUTED.fullmatch, modules) if found}
    if not routed:
        return None
    return sorted({*routed, "lm_head", *(module for module in modules if _is_head(module, tensors))})


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the dense weight `name` belongs to a Conv1D, which stores it as (in_features, out_features).

    In 4 bits it is stored as that of a linear module, (out_features, in_features).
    """
    leaf = name.removesuffix(SUFFIX).rpartition(".")[2]
    return _model_type(config) in CONV1D_TYPES and leaf in CONV1D_LEAVES


def _model_type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type", ""))


def _is_linear(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    module, info = name.removesuffix(SUFFIX), tensors[name]
    is_matrix = module != name and len(info.shape) == 2 and 0 not in info.shape
    is_another = EMBEDDING.fullmatch(module.rpartition(".")[2]) or ROUTED.fullmatch(module) or _is_head(module, tensors)
    return is_matrix and not is_another


def _is_head(module: str, tensors: Collection[str]) -> bool:
    """Whether a module of a model with these tensors is an output head that stays dense."""
    return HEAD.fullmatch(module) is not None and not (module == SCORE and f"{SCORE}.bias" in tensors)
