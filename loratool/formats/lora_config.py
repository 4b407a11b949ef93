"""The checked part of a PEFT LoRA configuration that affects numbers, with the rules by which PEFT applies it.

The keys and their meaning are those of ``peft.LoraConfig`` (PEFT 0.21). Features that loratool cannot compute are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.config_reader import ConfigReader
from loratool.formats.kinds import FEATURES, KINDS, VARIANTS
from loratool.formats.module_targets import COMMON_KEYS, other_type
from loratool.formats.rank_config import RANK_KEYS, RankConfig, rank_fields

ALPHA_KEY: Final = "lora_alpha"
REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    kind.setting: (f"{kind.title} ({kind.setting})", kind.why_not) for kind in VARIANTS if kind.setting and kind.why_not
} | {feature.setting: (feature.title, feature.why_not) for feature in FEATURES if feature.setting}
"""Configuration keys of features that are not computed, each with the feature's name and the reason."""

LORA_BIAS: Final = "lora_bias"
TARGET_PARAMETERS: Final = "target_parameters"

BIASES: Final = ("none", "all", "lora_only")
"""Values of ``bias``; with the last two PEFT trains and saves biases, which replace the base's."""

HARMLESS_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that only fill the factors. With others PEFT changes the base itself (pissa, olora, corda, loftq,
lora_ga)."""

_OTHER_KEYS: Final = """
    lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights megatron_core loftq_config eva_config corda_config
    lora_ga_config velora_config monteclora_config qalora_group_size runtime_config ensure_weight_tying lora_bias
    trainable_token_indices target_parameters
"""
KNOWN: Final = COMMON_KEYS.union(
    RANK_KEYS, REFUSED, _OTHER_KEYS.split(), (kind.setting for kind in VARIANTS if kind.setting)
)
"""The keys of ``peft.LoraConfig``; those not used elsewhere here concern training or record the origin."""

_OTHER_KINDS_KEYS: Final = frozenset[str]().union(*(kind.keys for kind in KINDS.values())) - KNOWN | RANK_KEYS
"""Keys that other kinds' configurations add to LoRA's, or use with another meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig(RankConfig):
    """Ranks, scalings and targets of a LoRA. `target_parameters` are the ends of the names of parameters that it changes."""

    use_rslora: bool
    target_parameters: tuple[str, ...] = ()

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> Self:
        """Check a configuration.

        Raises:
            UnsupportedError: it asks for a feature that loratool does not compute.
            AdapterError: a value is missing or impossible.
        """
        _refuse_unsupported(config, source)
        read = ConfigReader(config, source)
        return cls(
            **rank_fields(config, source, ALPHA_KEY, KNOWN),
            use_rslora=read.flag("use_rslora"),
            target_parameters=read.strings(TARGET_PARAMETERS),
        )

    def scaling_of(self, module: str) -> float:
        """Return the scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha, rank = self.alpha_of(module), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def for_modules(self, modules: Mapping[str, tuple[int, float]]) -> Self:
        """Return these settings with the rank and alpha of each of `modules`."""
        r, alpha, ranks, alphas = _by_module(modules)
        return replace(self, r=r, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas)


def lora_config(
    modules: Mapping[str, tuple[int, float]], source: Mapping[str, Any], *, use_rslora: bool = False
) -> dict[str, Any]:
    """Return a configuration that gives each of `modules` its rank and alpha, and otherwise equals `source`.

    The largest rank and its alpha become ``r`` and ``lora_alpha``. If all modules have the same scaling, programs that ignore
    the patterns then still use it. `source` may be another kind's configuration.
    """
    r, alpha, ranks, alphas = _by_module(modules)
    kept = {key: value for key, value in source.items() if key not in _OTHER_KINDS_KEYS}
    return kept | {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _by_module(modules: Mapping[str, tuple[int, float]]) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """Return the largest rank and its alpha, and patterns for the modules that have others."""
    r, alpha = max(modules.values())
    keys = {module: f"^{re.escape(module)}" for module in sorted(modules)}
    return (
        r,
        alpha,
        {key: modules[module][0] for module, key in keys.items() if modules[module][0] != r},
        {key: modules[module][1] for module, key in keys.items() if modules[module][1] != alpha},
    )


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    peft_type = config.get("peft_type") or "LORA"
    if peft_type != "LORA":
        raise other_type(peft_type, source)
    for key, (feature, why_not) in REFUSED.items():
        if config.get(key):
            said = f" ({quoted(config[key], 60)})" if isinstance(config[key], list) else ""
            raise UnsupportedError(f"{quoted(source)} uses {feature}{said}: {why_not}")
    bias = config.get("bias") or "none"
    if bias not in BIASES:
        raise AdapterError(f"'bias' in {quoted(source)} is {quoted(bias, 40)} and must be none, all or lora_only")
    init = config.get("init_lora_weights", True)
    if init and init not in HARMLESS_INITS:
        raise UnsupportedError(
            f"{quoted(source)} was initialised with {quoted(init)}, which changes the base, so it is not an update of the "
            "original one; in PEFT, load it as it was trained and call save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=INITIAL), where INITIAL is the adapter's folder from before training"
        )
