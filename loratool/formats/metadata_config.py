"""A LoRA's configuration in a file's metadata, as diffusers keeps it: JSON under ``lora_adapter_metadata``.

One component's file has PEFT's keys as they are (``r``, ``lora_alpha``, ``alpha_pattern``, ...); a pipeline's has them behind the
component's name (``unet.r``, ``text_encoder.lora_alpha``), as its tensors are. (diffusers 0.42, ``loaders/lora_base.py``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loratool.checkpoint.json_text import parse_json
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.alpha import Statement
from loratool.formats.kinds import VARIANTS
from loratool.formats.lora_config import LoraConfig

KEYS: Final = ("lora_adapter_metadata", "peft_config", "lora_config")
"""The metadata keys that programs use."""


def stated_configurations(metadata: Mapping[str, Any], source: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, for each metadata key with configurations, the components' configurations by prefix (``unet.``, or "").

    Raises:
        AdapterError: the value is not a JSON object.
    """
    return {key: _components(_parsed(metadata[key], key, source)) for key in KEYS if isinstance(metadata.get(key), str)}


def whole_statements(metadata: Mapping[str, Any], module: str, source: str) -> list[Statement]:
    """Return what such configurations state as the alpha of a whole adapter that is not a LoRA, as the alpha of `module`.

    Raises:
        AdapterError: the value is not a JSON object.
    """
    return [
        Statement(f"its metadata {quoted(key)}", {module: float(config["lora_alpha"])})
        for key, components in stated_configurations(metadata, source).items()
        for config in components.values()
        if isinstance(config.get("lora_alpha"), int | float) and not isinstance(config["lora_alpha"], bool)
    ]


def refuse_variants(config: Mapping[str, Any], place: str) -> None:
    """Raise UnsupportedError if a configuration asks for a variant of LoRA; only PEFT's own format has tensors for variants."""
    variant = next((kind for kind in VARIANTS if kind.setting and config.get(kind.setting)), None)
    if variant is not None:
        raise UnsupportedError(
            f"{place} says {variant.title} ({variant.setting}), which loratool reads only in PEFT's own format; save it again "
            "with PEFT's save_pretrained"
        )


def statements(metadata: Mapping[str, Any], ranks: Mapping[str, int], source: str) -> tuple[list[Statement], bool]:
    """Return what such configurations state about the alphas of the modules in `ranks`, and whether they are rsLoRA's.

    Raises:
        UnsupportedError: one asks for a feature that loratool does not compute.
        AdapterError: one contradicts a rank of the tensors, or a value is impossible.
    """
    found, rslora = [], set()
    for key, components in stated_configurations(metadata, source).items():
        alphas = {}
        for prefix, config in components.items():
            lora = LoraConfig.parse(config, source)
            refuse_variants(config, f"the metadata {quoted(key)} of {quoted(source)}")
            rslora.add(lora.use_rslora)
            for module in _of(prefix, components, ranks):
                name = module.removeprefix(prefix)
                if lora.rank_of(name) != ranks[module]:
                    raise AdapterError(
                        f"{quoted(module)} in {quoted(source)} has rank {ranks[module]} and its metadata {quoted(key)} say "
                        f"{lora.rank_of(name)}; save it again"
                    )
                alphas[module] = float(lora.alpha_of(name))
        found.append(Statement(f"its metadata {quoted(key)}", alphas))
    if len(rslora) > 1:
        raise AdapterError(f"the metadata of {quoted(source)} contradict each other about use_rslora; save it again")
    return found, rslora == {True}


def _of(prefix: str, components: Mapping[str, Any], modules: Mapping[str, int]) -> list[str]:
    """Return the modules with a component's prefix, or all if it is the only component and no module has a prefix."""
    found = [module for module in modules if module.startswith(prefix)]
    return list(modules) if not found and len(components) == 1 else found


def _parsed(text: str, key: str, source: str) -> dict[str, Any]:
    try:
        value = parse_json(text.encode())
    except ValueError as error:
        raise AdapterError(f"the metadata {quoted(key)} of {quoted(source)}: {error}; save the adapter again") from None
    if not isinstance(value, dict):
        raise AdapterError(
            f"the metadata {quoted(key)} of {quoted(source)} is not a JSON object; save the adapter again"
        )
    return value


def _components(value: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if "r" in value or "lora_alpha" in value:
        return {"": dict(value)}
    found: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        component, dot, name = key.partition(".")
        if dot:
            found.setdefault(f"{component}.", {})[name] = item
    return {prefix: config for prefix, config in found.items() if "r" in config or "lora_alpha" in config}
