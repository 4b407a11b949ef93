"""LoRA (Hu et al. 2021, arXiv:2106.09685) in PEFT's names: configurations, alphas, and the update of each module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter, of_weights
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import CONFIGURATION, Alpha, Statement, settled
from loratool.formats.bare import bare_config, stated_alphas, unstated
from loratool.formats.builder import Builder, Factors
from loratool.formats.expert_factors import split_parameters
from loratool.formats.kinds import LORA, RECORDED, kind_named
from loratool.formats.lora_config import LoraConfig, lora_config
from loratool.formats.lora_product import product_of
from loratool.formats.module_targets import ModuleTargets
from loratool.formats.tensor_keys import BASE_LAYER, pair_factors, peft_key, rank_of
from loratool.updates import Update

OUTPUT_OF_ATTENTION: Final = f".{BASE_LAYER}.out_proj"
"""The place of an nn.MultiheadAttention's output projection, which PEFT adapts together with the packed input projections."""


def read_pairs(files: AdapterFiles, given: Alpha | None, *, absent_is_rank: bool = False) -> Adapter:
    """Read factors that have no PEFT configuration, with any module names; raises like `peft.read`."""
    config, notes = bare_config(files, given, absent_is_rank=absent_is_rank)
    lora = LoraConfig.parse(config, files.config_source if files.config else files.source)
    return _of_updates(files, config, lora, notes)


def read_lora(files: AdapterFiles, given: Alpha | None) -> Adapter:
    if not files.config:
        return read_pairs(files, given)
    config, lora, notes = _with_alpha(files, given)
    return _of_updates(files, config, lora, notes)


def _of_updates(files: AdapterFiles, config: Mapping[str, Any], lora: LoraConfig, notes: tuple[str, ...]) -> Adapter:
    found = pair_factors(files.tensors, files.source)
    for module in found:
        _refuse_attention(module, files.source)
    pairs, parameters = split_parameters(found, lora, config, files.source)
    for module, pair in pairs.items():
        _refuse_unfit(module, rank_of(pair), lora, files.source)
    updates = lora_updates(pairs, lora)
    kind = next((kind.name for kind in RECORDED if files.facts.get("kind") == kind.name), LORA)
    adapter = adapter_of(files, kind, config, lora, updates, notes)
    return replace(adapter, changes={**adapter.changes, **parameters}) if parameters else adapter


def _with_alpha(files: AdapterFiles, given: Alpha | None) -> tuple[Mapping[str, Any], LoraConfig, tuple[str, ...]]:
    """Return the configuration with the alpha of every module, as it is and parsed, and notes.

    If it states no alpha, that comes from elsewhere or the user.
    """
    source, config = files.source, files.config
    lora = LoraConfig.parse(
        {"lora_alpha": 1, **{k: v for k, v in config.items() if v is not None}}, files.config_source
    )
    ranks = {module: rank_of(pair) for module, pair in pair_factors(files.tensors, source).items()}
    said, _ = stated_alphas(files, ranks)
    if config.get("lora_alpha") is not None:
        said = [Statement(CONFIGURATION, {module: float(lora.alpha_of(module)) for module in ranks}), *said]
    alphas, notes = settled(ranks, said, given, source, unstated=unstated(files))
    if config.get("lora_alpha") is not None and all(alphas[module] == lora.alpha_of(module) for module in ranks):
        return config, lora, notes
    modules = {module: (rank, alphas[module]) for module, rank in ranks.items()}
    return lora_config(modules, config, use_rslora=lora.use_rslora), lora.for_modules(modules), notes


def _refuse_attention(module: str, source: str) -> None:
    """Raise UnsupportedError if the factors are those of an nn.MultiheadAttention."""
    if module.endswith(OUTPUT_OF_ATTENTION):
        raise UnsupportedError(
            f"{quoted(source)} holds a LoRA of {quoted(module.removesuffix(OUTPUT_OF_ATTENTION))}, an nn.MultiheadAttention, "
            "which loratool does not compute yet; PEFT's merge_and_unload adds the update of its output projection twice, so "
            "keep the adapter unmerged, or train one on a model with separate projections"
        )


def _refuse_unfit(module: str, rank: int, lora: LoraConfig, source: str) -> None:
    """Raise AdapterError if the configuration contradicts the factors of a module."""
    if not lora.targets(module):
        raise AdapterError(
            f"{quoted(source)} holds tensors for {quoted(module)}, which its configuration does not target, so "
            "PEFT would ignore them; correct target_modules, exclude_modules or layers_to_transform"
        )
    if rank != lora.rank_of(module):
        raise AdapterError(
            f"{quoted(module)} in {quoted(source)} has rank {rank} and its configuration says "
            f"{lora.rank_of(module)}; correct r or rank_pattern"
        )


def lora_updates(factors: Factors, lora: LoraConfig) -> dict[str, Update]:
    """Return the update of each module."""
    return {module: product_of(each, lora.scaling_of(module)) for module, each in factors.items()}


def lora_settings(adapter: Adapter) -> LoraConfig:
    """Return the settings of an adapter whose configuration is a LoRA's.

    Raises:
        AdapterError: it is of another type.
    """
    if not isinstance(adapter.settings, LoraConfig):
        kind = kind_named(adapter.kind)
        raise AdapterError(f"{quoted(adapter.name)} is {kind.article} {kind.title}, and this needs a LoRA")
    return adapter.settings


def adapter_of(files: AdapterFiles, kind: str, config: Mapping[str, Any], settings: ModuleTargets,
             updates: Mapping[str, Update], notes: tuple[str, ...]) -> Adapter:  # fmt: skip
    """Return the adapter of these files and updates, by module, with a note on ignored keys of its configuration."""
    if settings.unknown:
        listed = ", ".join(quoted(key, 40) for key in settings.unknown[:5])
        notes += (f"its configuration has keys that PEFT does not know, which were ignored: {listed}",)
    return Adapter(
        files.name, files.file, files.sha256(), kind, of_weights(updates), config, settings, files.facts, notes
    )


BUILDER: Final = Builder(read_lora, LoraConfig.parse, lora_updates, peft_key)
