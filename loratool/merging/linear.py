"""Which matrices of a model transformers stores in 4 bits: the weights of its linear modules.

transformers replaces every linear module except the output head, modules tied to it and the model's last module
(``get_keys_to_not_convert``). It inspects a built model. Here the names of the tensors, ``config.json`` and the tables of
loratool.architecture decide, so that no model is built. The results agree for all causal, sequence-to-sequence and
classification models of transformers 5.23, except the model types of `UNLIKE` and the classes of `UNLIKE_CLASSES`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from loratool.architecture import Architecture, Role, any_model, architecture_of, module_of
from loratool.checkpoint.header import TensorInfo
from loratool.errors import UnsupportedError, quoted
from loratool.formats.names import SUFFIX

LAST: Final = re.compile(r"score|head|(.*\.)?head\.attention\.out_proj")
"""Modules that stay dense because they come last."""

SCORE: Final = "score"
"""The head of classification models. transformers keeps it dense because it comes last, but finds the last module by the name of
the last parameter. A head with a bias, as for token classification, is therefore stored in 4 bits."""

ROUTED: Final = re.compile(r"((?:.*\.)?(?:experts|router|gate))(?:\..*)?")
"""Experts and their router, by the module that contains both. They are not linear modules in transformers 5; earlier versions
treat them as linear unless they are named."""

T5_TYPES: Final = frozenset({"t5", "mt5", "umt5"})
"""Model types that keep the modules called ``wo`` in fp32."""

UNLIKE: Final = frozenset({
    "afmoe", "aimv2", "altclip", "axk2", "blip-2", "canine", "chinese_clip", "clip", "clipseg", "ctrl", "deepseek_v32",
    "deepseek_v4", "dia", "falcon", "fsmt", "fuyu", "gemma3n", "gemma3n_text", "glm_moe_dsa", "ibert", "instructblip",
    "instructblipvideo", "jetmoe", "kosmos-2.5", "lilt", "longcat_flash", "markuplm", "metaclip_2", "nllb-moe", "ovis2", "owlv2",
    "owlvit", "pegasus_x", "phi4_multimodal", "pix2struct", "pop2piano", "prophetnet", "switch_transformers", "tapas", "udop",
    "voxtral_realtime", "xlm", "zamba", "zamba2", "zaya",
})  # fmt: skip
"""Model types whose linear modules cannot be identified by name."""

UNLIKE_CLASSES: Final = ("ForCTC", "OlmoModel")
"""Suffixes of class names with the same problem."""


def linear_weights(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the weights of linear modules that are stored in 4 bits, sorted.

    Raises:
        UnsupportedError: the names of this type of model do not identify its linear modules.
    """
    model_type, classes = str(config.get("model_type", "")), config.get("architectures")
    unlike = [name for name in classes if str(name).endswith(UNLIKE_CLASSES)] if isinstance(classes, list) else []
    if model_type in UNLIKE or unlike:
        raise UnsupportedError(
            f"the tensor names of a {quoted(unlike[0] if unlike else model_type)} model do not show which modules to store in "
            "4 bits; quantize it with transformers and bitsandbytes"
        )
    keeps_wo = model_type in T5_TYPES
    architecture = architecture_of(config, tensors)
    return tuple(
        name
        for name in sorted(tensors)
        if _is_linear(name, architecture) and not (keeps_wo and name.endswith(".wo" + SUFFIX))
    )


def skipped_modules(tensors: Collection[str]) -> list[str] | None:
    """Return ``llm_int8_skip_modules`` for a quantization_config; None if transformers' default is the same."""
    modules = [module_of(name) for name in tensors if name.endswith(SUFFIX)]
    routed = {found[1] for found in map(ROUTED.fullmatch, modules) if found}
    if not routed:
        return None
    heads = (each for each in modules if any_model().role(each + SUFFIX) is Role.HEAD or _is_last(each, tensors))
    return sorted({*routed, "lm_head", *heads})


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether the dense weight `name` belongs to a Conv1D, which stores it as (in_features, out_features).

    In 4 bits it is stored like a linear module's, (out_features, in_features).
    """
    architecture = architecture_of(config)
    return architecture.role(name) is Role.LINEAR and architecture.transposed(name) is True


def _is_linear(name: str, architecture: Architecture) -> bool:
    module, info = module_of(name), architecture.tensors[name]
    if not name.endswith(SUFFIX) or len(info.shape) != 2 or 0 in info.shape:
        return False
    is_linear = architecture.role(name) in (Role.LINEAR, Role.CLASSIFIER) and not ROUTED.fullmatch(module)
    return is_linear and not _is_last(module, architecture.tensors)


def _is_last(module: str, tensors: Collection[str]) -> bool:
    """Return whether a module stays dense because it comes last in a model with these tensors."""
    return LAST.fullmatch(module) is not None and not (module == SCORE and f"{SCORE}.bias" in tensors)
