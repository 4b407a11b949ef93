"""The checked part of a PEFT LoRA configuration that affects numbers, with the rules by which PEFT applies it.

The keys and their meaning are those of ``peft.LoraConfig`` (PEFT 0.21). Features that loratool cannot compute are refused.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import regex

from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.kinds import FEATURES, KINDS, NOT_YET, OF_PEFT, VARIANTS
from loratool.formats.loadable import whole

ALL_LINEAR: Final = "all-linear"
MATCH_SECONDS: Final = 1.0
"""Time limit, in seconds, for matching an untrusted pattern against a module name."""

MOST_PATTERN_LETTERS: Final = 10_000
MOST_REPEATS: Final = 10_000
"""Limit of the product of the counts in a pattern, as in ``(a{100}){100}``. Compiling takes as much memory and has no timeout."""

_COUNTS: Final = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")

MOST_DIGITS: Final = 9
"""Limit of the digits of a layer's number."""

REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    kind.setting: (f"{kind.title} ({kind.setting})", kind.why_not) for kind in VARIANTS if kind.setting and kind.why_not
} | {feature.setting: (feature.title, feature.why_not) for feature in FEATURES if feature.setting}
"""Configuration keys of features that are not computed, each with the feature's name and the reason."""

BIASES: Final = ("all", "lora_only")
"""Values of ``bias`` with which PEFT trains and saves biases."""

HARMLESS_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that only fill the factors. With others PEFT changes the base itself (pissa, olora, corda, loftq,
lora_ga) or rounds the update differently (mica)."""

_OTHER_KEYS: Final = """
    r lora_alpha lora_dropout target_modules exclude_modules fan_in_fan_out bias use_rslora init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config eva_config corda_config
    lora_ga_config velora_config modules_to_save qalora_group_size runtime_config ensure_weight_tying task_type peft_type
    auto_mapping peft_version base_model_name_or_path revision inference_mode
"""
KNOWN: Final = frozenset(REFUSED).union(_OTHER_KEYS.split(), (kind.setting for kind in VARIANTS if kind.setting))
"""The keys of ``peft.LoraConfig``; those not used elsewhere here concern training or record the origin."""

_OTHER_KINDS_KEYS: Final = frozenset[str]().union(*(kind.keys for kind in KINDS.values()))
"""Keys that other kinds' configurations add to LoRA's, or use with another meaning."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Ranks, scalings and targets of a LoRA. `source` is the file it came from, for messages."""

    source: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    fan_in_fan_out: bool
    unknown: tuple[str, ...]

    @classmethod
    def parse(cls, config: Mapping[str, Any], source: str) -> LoraConfig:
        """Check a configuration.

        Raises:
            UnsupportedError: it asks for a feature that loratool does not compute.
            AdapterError: a value is missing or impossible.
        """
        _refuse_unsupported(config, source)
        read = ConfigReader(config, source)
        return cls(
            source=source,
            r=read.positive_int("r"),
            lora_alpha=read.number("lora_alpha"),
            use_rslora=read.flag("use_rslora"),
            rank_pattern={key: read.positive_int(key, value) for key, value in read.mapping("rank_pattern")},
            alpha_pattern={key: read.number(key, value) for key, value in read.mapping("alpha_pattern")},
            target_modules=read.names("target_modules", None),
            exclude_modules=read.names("exclude_modules", ()) or (),
            layers_to_transform=read.layers("layers_to_transform"),
            layers_pattern=read.strings("layers_pattern"),
            fan_in_fan_out=read.flag("fan_in_fan_out"),
            unknown=tuple(sorted(str(key) for key in config if key not in KNOWN)),
        )

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives `module`."""
        return self.rank_pattern.get(self._pattern_key(self.rank_pattern, module), self.r)

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the configuration gives `module`."""
        return self.alpha_pattern.get(self._pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """Return the scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha, rank = self.alpha_of(module), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Return whether PEFT would put a LoRA on `module` (``peft.tuners.tuners_utils.check_target_module_exists``)."""
        if self._is_excluded(module):
            return False
        if self.target_modules is None or self.target_modules == ALL_LINEAR:
            return True
        if isinstance(self.target_modules, str):
            return self._matches(self.target_modules, module, whole=True) is not None
        if module in self.target_modules:
            return True
        return any(module.endswith(f".{name}") for name in self.target_modules) and self._is_chosen_layer(module)

    def _is_excluded(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return self._matches(self.exclude_modules, module, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.exclude_modules)

    def _is_chosen_layer(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            found = self._matches(pattern, module, whole=False)
            if found is not None:
                index = found["idx"] or ""
                if not index.isdecimal() or len(index) > MOST_DIGITS:
                    raise AdapterError(
                        f"{quoted(pattern)} in {quoted(self.source)} finds no layer number in {quoted(module)}; "
                        "correct layers_pattern"
                    )
                return int(index) in self.layers_to_transform
        return False

    def _pattern_key(self, patterns: Mapping[str, object], module: str) -> str:
        """Return the first pattern that matches the end of `module`, like ``peft.utils.get_pattern_key``."""
        for key in patterns:
            name = _whole_name(key)
            if module == name or (name is None and self._matches(rf"(.*\.)?({key})$", module, whole=False) is not None):
                return key
        return module

    def _matches(self, pattern: str, module: str, *, whole: bool) -> regex.Match[str] | None:
        match = regex.fullmatch if whole else regex.match
        if len(pattern) > MOST_PATTERN_LETTERS or _repeats(pattern) > MOST_REPEATS:
            raise AdapterError(f"the pattern {quoted(pattern)} in {quoted(self.source)} is too large to match")
        try:
            re.compile(pattern)  # reject regex's own recursion, which PEFT's dialect lacks and no timeout bounds
            return match(pattern, module, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise AdapterError(
                f"the pattern {quoted(pattern)} in {quoted(self.source)} takes too long to match"
            ) from None
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{quoted(pattern)} in {quoted(self.source)} is not a valid pattern: {error}") from None


@lru_cache(4096)
def _whole_name(pattern: str) -> str | None:
    """Return the only module that `pattern` matches, if it is ``^`` and an escaped name, as `lora_config` writes it.

    An adapter with many ranks has such a pattern for each module, and matching all against all would take minutes.
    """
    name = re.sub(r"\\(.)", r"\1", pattern[1:])
    return name if pattern == f"^{re.escape(name)}" else None


def lora_config(
    modules: Mapping[str, tuple[int, float]], source: Mapping[str, Any], *, use_rslora: bool = False
) -> dict[str, Any]:
    """Return a configuration that gives each of `modules` its rank and alpha, and otherwise equals `source`.

    The largest rank and its alpha become ``r`` and ``lora_alpha``. If all modules have the same scaling, programs that ignore
    the patterns then still use it. `source` may be another kind's configuration.
    """
    r, alpha = max(modules.values())
    kept = {key: value for key, value in source.items() if key not in _OTHER_KINDS_KEYS}
    keys = {module: f"^{re.escape(module)}" for module in sorted(modules)}
    return kept | {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {key: modules[module][0] for module, key in keys.items() if modules[module][0] != r},
        "alpha_pattern": {key: modules[module][1] for module, key in keys.items() if modules[module][1] != alpha},
    }


def _repeats(pattern: str) -> int:
    """Return the product of all counts in a pattern."""
    return math.prod(max(1, int(count[:9] or 0)) for pair in _COUNTS.findall(pattern) for count in pair)


def _refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    peft_type = config.get("peft_type") or "LORA"
    if peft_type != "LORA":
        raise other_type(peft_type, source)
    for key, (feature, why_not) in REFUSED.items():
        if config.get(key):
            raise UnsupportedError(f"{quoted(source)} uses {feature}: {why_not}")
    bias = config.get("bias") or "none"
    if bias in BIASES:
        raise UnsupportedError(f"{quoted(source)} holds trained biases (bias={quoted(bias)}): {NOT_YET}")
    if bias != "none":
        raise AdapterError(f"'bias' in {quoted(source)} is {quoted(bias, 40)} and must be none, all or lora_only")
    init = config.get("init_lora_weights", True)
    if init and init not in HARMLESS_INITS:
        raise UnsupportedError(
            f"{quoted(source)} was initialised with {quoted(init)}, so it is not an update of the original base; save it with "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) to make it one"
        )


def other_type(peft_type: object, source: str) -> UnsupportedError:
    """Return the error for a PEFT type that loratool does not compute."""
    row = OF_PEFT.get(peft_type) if isinstance(peft_type, str) else None
    if row is None:
        return UnsupportedError(
            f"{quoted(source)} is of the PEFT type {quoted(peft_type, 40)}, which this loratool does not know; upgrade "
            "loratool, or merge it with PEFT"
        )
    return UnsupportedError(f"{quoted(source)} is {row.title} ({row.peft_type}): {row.why_not}")


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Typed access to a configuration's values; each method raises AdapterError for a value of another type."""

    config: Mapping[str, Any]
    source: str

    def positive_int(self, key: str, value: object = None) -> int:
        value = self.config.get(key) if value is None else value
        value = whole(value)
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number of at least 1")
        return value

    def number(self, key: str, value: object = None) -> float:
        value = self.config.get(key) if value is None else value
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # type: ignore[arg-type]
            raise self._wrong(key, value, "a number")
        return value  # type: ignore[return-value]

    def flag(self, key: str) -> bool:
        value = self.config.get(key) or False
        if not isinstance(value, bool) and value != 1:
            raise self._wrong(key, value, "true or false")
        return bool(value)

    def mapping(self, key: str) -> list[tuple[str, Any]]:
        value = self.config.get(key) or {}
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return list(value.items())

    def names(self, key: str, default: tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        value = self.config.get(key)
        if value is None:
            return default
        return value if isinstance(value, str) else self.strings(key)

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.config.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of names")
        return tuple(value)

    def layers(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        value = [] if value is None else value if isinstance(value, list) else [value]
        layers = [whole(item) for item in value]
        if not all(type(layer) is int for layer in layers):
            raise self._wrong(key, self.config.get(key), "a list of layer numbers")
        return tuple(layers)  # type: ignore[arg-type]

    def _wrong(self, key: str, value: object, expected: str) -> AdapterError:
        text = "the text " if isinstance(value, str) else ""
        return AdapterError(
            f"{quoted(key)} in {quoted(self.source)} is {text}{quoted(value, 40)} and must be {expected}"
        )
