"""PEFT's files: a folder with ``adapter_config.json``, one file with that JSON in its metadata, or only factors.

All of PEFT's types are recognized by their configuration or their tensors; those with a row in `formats.builders` are computed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Final

from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter, target_of
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha
from loratool.formats.beside import changes_beside, split_beside
from loratool.formats.builders import BUILDERS
from loratool.formats.describe import kind_of, parts_of, ranks_of
from loratool.formats.kinds import KINDS, LORA, NEVER_ALONE, OF_PEFT, RECORDED, VARIANTS, Kind, kind_named
from loratool.formats.loadable import loadable
from loratool.formats.module_targets import other_type
from loratool.formats.replacements import split_own_base, split_replacements
from loratool.formats.tensor_keys import PREFIX, split_peft
from loratool.formats.training_only import without_training


def _claims(files: AdapterFiles) -> bool:
    if "peft_type" in files.config or any(name.startswith(PREFIX) for name in files.tensors):
        return True
    return any(split_peft(name) is not None for name in files.tensors)


def describe(files: AdapterFiles) -> Description:
    """Return what PEFT's configuration and tensors say about an adapter of any type."""
    modules = {name: parts for name, parts in parts_of(files.tensors, split_peft).items() if name}
    name = _kind(files)
    row = kind_named(name)
    ranks = ranks_of(modules, name)
    rank = files.config.get("r")
    if isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 1 << 31:
        # Factors of experts are stacked, so their shapes show a multiple of the rank.
        stacked = {module for module in ranks if files.config.get("target_parameters")}
        ranks |= dict.fromkeys([module for module in modules if module not in ranks or module in stacked], rank)
    return Description(
        kind=name,
        ranks=ranks,
        alpha=_alpha(files.config.get(row.alpha_key)),
        modules=tuple(modules),
        base_model=_text(files.config.get("base_model_name_or_path")),
        why_not=row.why_not,
    )


def read(files: AdapterFiles, given: Alpha | None) -> Adapter:
    """Read an adapter of a kind that has a builder.

    Raises:
        UnsupportedError: it uses a feature, or is of a type, that loratool does not compute.
        AdapterError: it is damaged or incomplete, or does not state its alpha.
    """
    source = files.source
    files, of_training = without_training(files)
    peft_type = _peft_type(files)
    kind, is_lora = kind_named(_kind(files)), peft_type == KINDS[LORA].peft_type
    is_other = is_lora and kind.peft_type not in (None, peft_type)
    builder = BUILDERS.get(LORA if is_other else kind.name) or (BUILDERS[LORA] if is_lora else None)
    if builder is None:
        raise other_type(peft_type, source)
    config = {**loadable(files.config, files.config_source), "peft_type": peft_type} if files.config else {}
    factors, replaced = split_replacements(files.tensors, config, source)
    if config and config.get("target_modules") is None and not config.get("target_parameters"):
        # PEFT has default targets for each type of model, and would ignore tensors of other modules.
        config["target_modules"] = sorted({target_of(module) for module in parts_of(factors, split_peft) if module})
    beside, factors = split_beside(factors, source)
    own = replace(files, tensors=factors, config=config)
    notes: tuple[str, ...] = ()
    if replaced:
        notes = (
            f"it holds {len(replaced)} {'tensors' if len(replaced) > 1 else 'tensor'} whole "
            f"({quoted(next(iter(replaced)))}, ...; modules_to_save, embeddings, biases or norms), which replace the base's own",
        )
    adapter = builder.read(own, given)
    adapter = replace(adapter, changes={**adapter.changes, **changes_beside(beside, adapter)})
    own_base = split_own_base(adapter, replaced)
    replaced = {name: each for name, each in replaced.items() if name not in own_base}
    return replace(
        adapter,
        changes={**adapter.changes, **replaced},
        own_base=own_base,
        whole=tuple(config.get("modules_to_save") or ()),
        notes=(*notes, *of_training, *adapter.notes),
    )


def _peft_type(files: AdapterFiles) -> object:
    """Return the type that the configuration names or, if it names none, the type of the tensors.

    Raises:
        AdapterError: it names one type but the tensors are of another.
    """
    named = files.config.get("peft_type")
    if named is None:
        return kind_named(_kind(files)).peft_type or KINDS[LORA].peft_type
    row = OF_PEFT.get(named) if isinstance(named, str) else None
    found = kind_of(parts_of(files.tensors, split_peft))
    if row is not None and row.parts and found is not None and not _may_hold(row, found):
        raise AdapterError(
            f"{quoted(files.source)} contradicts itself: its configuration says {row.title} ({named}) and its tensors are "
            f"{kind_named(found).title}'s; correct peft_type, or save it again"
        )
    return named


def _may_hold(row: Kind, kind: str) -> bool:
    """Return whether files of a type may have tensors of `kind`: its own, a variant, or one that accompanies others."""
    parts = kind_named(kind).parts
    return kind in (row.name, "mixed", *NEVER_ALONE) or any(part.startswith(row.parts) for part in parts)


def _word(peft_type: object) -> str:
    """Return a word for a type that this loratool does not know."""
    return re.sub(r"[^a-z0-9_]+", "_", str(peft_type).lower())[:32].strip("_") or "unknown"


def _alpha(stated: object) -> float | None:
    return float(stated) if isinstance(stated, int | float) and not isinstance(stated, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _kind(files: AdapterFiles) -> str:
    """Return the kind by the configuration's type and settings, else by the tensors, else by loratool's facts."""
    found = kind_of(parts_of(files.tensors, split_peft))
    named = _peft_type(files) if files.config.get("peft_type") is not None else None
    if named is not None and named != KINDS[LORA].peft_type:
        row = OF_PEFT.get(named) if isinstance(named, str) else None
        return row.name if row else _word(named)
    if found in (None, LORA):
        variant = next((kind.name for kind in VARIANTS if kind.setting and files.config.get(kind.setting)), None)
        return variant or next((kind.name for kind in RECORDED if files.facts.get("kind") == kind.name), LORA)
    return found


FORMAT: Final = AdapterFormat("peft", "PEFT", _claims, split_peft, describe, read, has_names_of_base=True)
