"""PEFT's files: a folder with ``adapter_config.json``, one file with the same as JSON in its metadata, or factors alone.

Of PEFT's types loratool computes LoRA and AdaLoRA; all of them are told, by the configuration or else by their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from loratool.errors import AdapterError, quoted
from loratool.formats.adalora import PEFT_TYPE, AdaLoraConfig, adalora_updates, bare_adalora_config
from loratool.formats.adapter import Adapter, of_weights
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha, Statement, metadata_statements, settled
from loratool.formats.bare import bare_config, stated_alphas, unstated
from loratool.formats.describe import NEVER_ALONE, kind_of, parts_of, ranks_of
from loratool.formats.dylora import KIND as DYLORA
from loratool.formats.kinds import LORA, OF_PEFT, VARIANTS, Kind, kind_named
from loratool.formats.lora_config import LoraConfig, lora_config, other_type
from loratool.formats.replacements import split_replacements
from loratool.formats.tensor_keys import PREFIX, pair_factors, split_peft
from loratool.updates import Update
from loratool.updates.low_rank import LowRank

_ALPHA_KEYS: Final = ("lora_alpha", "alpha", "randlora_alpha", "psoft_alpha")
"""What PEFT's configurations call alpha."""

CONFIGURATION: Final = "its configuration"
ALL: Final = "every module"


def _claims(files: AdapterFiles) -> bool:
    if "peft_type" in files.config or any(name.startswith(PREFIX) for name in files.tensors):
        return True
    return any(split_peft(name) is not None for name in files.tensors)


def describe(files: AdapterFiles) -> Description:
    """Return what PEFT's configuration and tensors tell of an adapter of any type."""
    modules = {name: parts for name, parts in parts_of(files.tensors, split_peft).items() if name}
    name = _kind(files)
    row = kind_named(name)
    ranks = ranks_of(modules, name)
    rank = files.config.get("r")
    if isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 1 << 31:
        # Factors of experts are stacked, so that their shapes tell several times the rank.
        stacked = {module for module in ranks if files.config.get("target_parameters")}
        ranks |= dict.fromkeys([module for module in modules if module not in ranks or module in stacked], rank)
    return Description(
        kind=name,
        ranks=ranks,
        alpha=_alpha(files.config),
        modules=tuple(modules),
        base_model=_text(files.config.get("base_model_name_or_path")),
        why_not=row.why_not,
    )


def read(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read a LoRA, DyLoRA or AdaLoRA.

    Raises:
        UnsupportedError: it uses a feature, or is of a type, that loratool does not compute.
        AdapterError: it is damaged or incomplete, or does not state its alpha.
    """
    source = files.source
    peft_type = _peft_type(files)
    if peft_type not in ("LORA", PEFT_TYPE):
        raise other_type(peft_type, source)
    config = {**files.config, "peft_type": peft_type} if files.config else {}
    factors, replaced = split_replacements(files.tensors, config, source)
    own = replace(files, tensors=factors, config=config)
    notes: tuple[str, ...] = ()
    if replaced:
        notes = (
            f"it holds {len(replaced)} {'tensors' if len(replaced) > 1 else 'tensor'} whole "
            f"({quoted(next(iter(replaced)))}, ...; modules_to_save or embeddings), which take the place of the base's own",
        )
    adapter = _read_adalora(own, given) if peft_type == PEFT_TYPE else _read_lora(own, given)
    return replace(
        adapter,
        changes={**adapter.changes, **replaced},
        whole=tuple(config.get("modules_to_save") or ()),
        notes=(*notes, *adapter.notes),
    )


def read_pairs(files: AdapterFiles, given: Alpha | None, *, absent_is_rank: bool = False) -> Adapter:
    """Read factors that have no PEFT configuration, whatever their modules are called; errors as `read`."""
    config, notes = bare_config(files, given, absent_is_rank=absent_is_rank)
    return _of_updates(files, config, LoraConfig.parse(config, files.source), notes)


def _read_lora(files: AdapterFiles, given: Alpha | None) -> Adapter:
    if not files.config:
        return read_pairs(files, given)
    config, notes = _with_alpha(files, given)
    return _of_updates(files, config, LoraConfig.parse(config, files.config_source), notes)


def _of_updates(files: AdapterFiles, config: Mapping[str, Any], lora: LoraConfig, notes: tuple[str, ...]) -> Adapter:
    kind = DYLORA if files.facts.get("kind") == DYLORA else LORA
    return _adapter(files, kind, config, lora, _lora_updates(files, lora), notes)


def _read_adalora(files: AdapterFiles, given: Alpha | None) -> Adapter:
    source = files.source
    stated = metadata_statements(files.metadata, [ALL])
    if not files.config:  # its alpha is asked for before its ranks are looked at
        settled({ALL: 1}, stated, given, source, unstated=unstated(files))
    config = files.config or bare_adalora_config(files.tensors, source)
    written = files.config_source
    init_r = AdaLoraConfig.parse({"lora_alpha": 1, **config}, written).init_r
    if files.config.get("lora_alpha") is not None:
        stated = [Statement(CONFIGURATION, {ALL: AdaLoraConfig.parse(config, written).alpha}), *stated]
    alphas, notes = settled({ALL: init_r}, stated, given, source, unstated=unstated(files))
    if not files.config or not stated or alphas[ALL] != config["lora_alpha"]:
        config = {**config, "lora_alpha": alphas[ALL]}
    adalora = AdaLoraConfig.parse(config, written)
    return _adapter(files, "adalora", config, adalora.targets, adalora_updates(files.tensors, source, adalora), notes)


def _with_alpha(files: AdapterFiles, given: Alpha | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The configuration with the alpha of every module: as it states it, unless it states none or the user decides."""
    source, config = files.source, files.config
    lora = LoraConfig.parse(
        {"lora_alpha": 1, **{k: v for k, v in config.items() if v is not None}}, files.config_source
    )
    ranks = {module: a.shape[0] for module, (a, _) in pair_factors(files.tensors, source).items()}
    said, _ = stated_alphas(files, ranks)
    if config.get("lora_alpha") is not None:
        said = [Statement(CONFIGURATION, {module: float(lora.alpha_of(module)) for module in ranks}), *said]
    alphas, notes = settled(ranks, said, given, source, unstated=unstated(files))
    if config.get("lora_alpha") is not None and all(alphas[module] == lora.alpha_of(module) for module in ranks):
        return config, notes
    modules = {module: (rank, alphas[module]) for module, rank in ranks.items()}
    return lora_config(modules, config, use_rslora=lora.use_rslora), notes


def _lora_updates(files: AdapterFiles, lora: LoraConfig) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for module, (a, b) in pair_factors(files.tensors, files.source).items():
        if not lora.targets(module):
            raise AdapterError(
                f"{quoted(files.source)} holds tensors for {quoted(module)}, which its configuration does not target, so "
                "PEFT would ignore them; correct target_modules, exclude_modules or layers_to_transform"
            )
        if a.shape[0] != lora.rank_of(module):
            raise AdapterError(
                f"{quoted(module)} in {quoted(files.source)} has rank {a.shape[0]} and its configuration says "
                f"{lora.rank_of(module)}; correct r or rank_pattern"
            )
        updates[module] = LowRank(a, b, lora.scaling_of(module))
    return updates


def _adapter(files: AdapterFiles, kind: str, config: Mapping[str, Any], targets: LoraConfig,
             updates: Mapping[str, Update], notes: tuple[str, ...]) -> Adapter:  # fmt: skip
    if targets.unknown:
        listed = ", ".join(quoted(key, 40) for key in targets.unknown[:5])
        notes += (f"its configuration has keys that PEFT's has not, which were ignored: {listed}",)
    return Adapter(
        files.name,
        files.file,
        files.sha256(),
        kind,
        of_weights(updates),
        config,
        files.facts,
        targets.fan_in_fan_out,
        notes,
    )


def _peft_type(files: AdapterFiles) -> object:
    """The type that the configuration names; where it names none, that of the tensors.

    Raises:
        AdapterError: it names one type and the tensors are another's.
    """
    named = files.config.get("peft_type")
    if named is None:
        return kind_named(_kind(files)).peft_type or "LORA"
    row = OF_PEFT.get(named) if isinstance(named, str) else None
    told = kind_of(parts_of(files.tensors, split_peft))
    if row is not None and row.parts and told is not None and not _may_hold(row, told):
        raise AdapterError(
            f"{quoted(files.source)} contradicts itself: its configuration says {row.title} ({named}) and its tensors are "
            f"{kind_named(told).title}'s; correct peft_type, or save it again"
        )
    return named


def _may_hold(row: Kind, told: str) -> bool:
    """Whether files of a type may have tensors of a kind: its own, a variant's, or what stands beside many kinds."""
    parts = kind_named(told).parts
    return told in (row.name, "mixed", *NEVER_ALONE) or any(part.startswith(row.parts) for part in parts)


def _word(peft_type: object) -> str:
    """A word for a type that this loratool does not know."""
    return re.sub(r"[^a-z0-9_]+", "_", str(peft_type).lower())[:32].strip("_") or "unknown"


def _alpha(config: Mapping[str, Any]) -> float | None:
    for key in _ALPHA_KEYS:
        stated = config.get(key)
        if isinstance(stated, int | float) and not isinstance(stated, bool):
            return float(stated)
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _kind(files: AdapterFiles) -> str:
    """The kind by the configuration's type and its settings, else by the tensors, else by what loratool records."""
    told = kind_of(parts_of(files.tensors, split_peft))
    named = _peft_type(files) if files.config.get("peft_type") is not None else None
    if named is not None and named != "LORA":
        row = OF_PEFT.get(named) if isinstance(named, str) else None
        return row.name if row else _word(named)
    if told in (None, LORA):
        variant = next((kind.name for kind in VARIANTS if kind.setting and files.config.get(kind.setting)), None)
        return variant or (DYLORA if files.facts.get("kind") == DYLORA else LORA)
    return told


FORMAT: Final = AdapterFormat("peft", "PEFT", _claims, split_peft, describe, read)
