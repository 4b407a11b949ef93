"""Reading an adapter: a PEFT directory, or a single safetensors file.

A PEFT directory holds ``adapter_config.json`` and ``adapter_model.safetensors``, and ``loratool.json`` where loratool
wrote it. A single file carries the same as JSON in its safetensors metadata, under ``adapter_config`` and
``loratool``. A file in kohya's layout says its alphas among its tensors. A bare file holds factors only: its alpha must
be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loratool.checkpoint.header import Header, read_header
from loratool.checkpoint.json_text import parse_json, read_json_object
from loratool.checkpoint.model import PICKLE_SUFFIXES
from loratool.errors import AdapterError, CheckpointError, NotFoundError, quoted
from loratool.formats.adalora import PEFT_TYPE, AdaLoraConfig, adalora_updates, bare_adalora_config, is_adalora
from loratool.formats.adapter import Adapter, sha256_of
from loratool.formats.dylora import KIND as DYLORA
from loratool.formats.kohya import is_kohya, kohya_notes, read_kohya
from loratool.formats.lora_config import LoraConfig, lora_config
from loratool.formats.replacements import split_replacements
from loratool.formats.tensor_keys import pair_factors
from loratool.updates import Update
from loratool.updates.low_rank import LowRank

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
FACTS_NAME: Final = "loratool.json"
CONFIG_KEY: Final = "adapter_config"
FACTS_KEY: Final = "loratool"
SINGLE_FILE_SUFFIXES: Final = frozenset({".safetensors", ".st"})


def read_adapter(path: Path, alpha: float | None = None) -> Adapter:
    """Read the adapter at `path`, a PEFT directory or a single file; `alpha` is for a bare file only.

    Raises:
        NotFoundError: nothing is there.
        UnsupportedError: it uses a feature that loratool does not compute.
        AdapterError: it is damaged, incomplete, a pickle, or without an alpha.
    """
    if path.is_dir():
        return _read_directory(path, path / WEIGHTS_NAME, alpha)
    if not path.exists():
        raise NotFoundError(f"there is no adapter at {quoted(path)}; give a file, a PEFT folder or a catalogued name")
    if path.suffix in PICKLE_SUFFIXES:
        raise AdapterError(_pickle_advice(path))
    if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).exists():
        return _read_directory(path.parent, path, alpha)
    header = _read_header(path)
    facts = _metadata_json(header, FACTS_KEY)
    config = _metadata_json(header, CONFIG_KEY)
    if not config and not is_kohya(header.tensors):
        config = _bare_config(header, alpha)
        note = f"the file says nothing of its scaling: alpha {alpha:g} is as you gave it"
        return _build(path.stem, header, config, facts, (note,))
    _refuse_alpha(alpha, path)
    return _build(path.stem, header, config, facts)


def _read_directory(folder: Path, weights: Path, alpha: float | None) -> Adapter:
    _refuse_alpha(alpha, folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
            if pickles and (folder / CONFIG_NAME).exists():
                raise AdapterError(_pickle_advice(pickles[0]))
            raise AdapterError(f"{quoted(folder)} is no PEFT adapter: it has no {name}")
    facts = folder / FACTS_NAME
    return _build(
        folder.resolve().name,
        _read_header(weights),
        _json_file(folder / CONFIG_NAME),
        _json_file(facts) if facts.is_file() else {},
    )


def _build(name: str, header: Header, config: Mapping[str, Any], facts: Mapping[str, Any],
           notes: tuple[str, ...] = ()) -> Adapter:  # fmt: skip
    if is_kohya(header.tensors):
        return _of_kohya(name, header, facts)
    factors, replacements = split_replacements(header.tensors, config, str(header.file))
    if replacements:
        notes += (
            f"it holds {len(replacements)} tensors whole ({quoted(next(iter(replacements)))}, ...; modules_to_save), which "
            "take the place of the base's own",
        )
    adapter = _of_factors(name, replace(header, tensors=factors), config, facts, notes)
    return replace(adapter, replacements=replacements)


def _of_kohya(name: str, header: Header, facts: Mapping[str, Any]) -> Adapter:
    updates, config, own = read_kohya(header)
    facts = {**facts, **own}
    return Adapter(
        name,
        header.file,
        sha256_of(header.file),
        _kind(facts),
        updates,
        config,
        facts,
        notes=kohya_notes(header.metadata),
        kohya=header.metadata,
    )


def _of_factors(name: str, header: Header, config: Mapping[str, Any], facts: Mapping[str, Any],
                notes: tuple[str, ...]) -> Adapter:  # fmt: skip
    source = str(header.file)
    updates: Mapping[str, Update]
    if config.get("peft_type") == PEFT_TYPE:
        adalora = AdaLoraConfig.parse(config, source)
        kind, targets, updates = "adalora", adalora.targets, adalora_updates(header, adalora)
    else:
        targets = LoraConfig.parse(config, source)
        kind, updates = _kind(facts), _lora_updates(header, targets)
    if targets.unknown:
        listed = ", ".join(quoted(key, 40) for key in targets.unknown[:5])
        notes += (f"its configuration has keys that PEFT's has not, which were ignored: {listed}",)
    return Adapter(
        name, header.file, sha256_of(header.file), kind, updates, config, facts, targets.fan_in_fan_out, notes
    )


def _kind(facts: Mapping[str, Any]) -> str:
    """What facts say that a low-rank update is."""
    return DYLORA if facts.get("kind") == DYLORA else "lora"


def _lora_updates(header: Header, lora: LoraConfig) -> dict[str, LowRank]:
    source = str(header.file)
    updates = {}
    for module, (a, b) in pair_factors(header.tensors, source).items():
        if not lora.targets(module):
            raise AdapterError(
                f"{quoted(source)} holds tensors for {quoted(module)}, which its configuration does not target, so PEFT "
                "would ignore them; mend target_modules, exclude_modules or layers_to_transform"
            )
        if a.shape[0] != lora.rank_of(module):
            raise AdapterError(
                f"{quoted(module)} in {quoted(source)} has rank {a.shape[0]} and its configuration says "
                f"{lora.rank_of(module)}; mend r or rank_pattern"
            )
        updates[module] = LowRank(a, b, lora.scaling_of(module))
    return updates


def _bare_config(header: Header, alpha: float | None) -> dict[str, Any]:
    adalora = is_adalora(header.tensors)
    factors = {} if adalora else pair_factors(header.tensors, str(header.file))
    if alpha is None:
        raise AdapterError(
            f"{quoted(header.file)} does not say its alpha, which decides how strongly it acts; give it with --alpha"
        )
    if adalora:
        return bare_adalora_config(header, alpha)
    targets = sorted({module.rsplit(".", 1)[-1] for module in factors})
    return lora_config({module: (a.shape[0], alpha) for module, (a, _) in factors.items()}, {"target_modules": targets})


def _refuse_alpha(alpha: float | None, path: Path) -> None:
    if alpha is not None:
        raise AdapterError(f"{quoted(path)} says its own alpha; leave --alpha out")


def _read_header(file: Path) -> Header:
    try:
        return read_header(file)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def _json_file(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def _metadata_json(header: Header, key: str) -> dict[str, Any]:
    if key not in header.metadata:
        return {}
    try:
        value = parse_json(header.metadata[key].encode())
    except ValueError as error:
        raise AdapterError(f"the metadata {key!r} of {quoted(header.file)}: {error}; save the adapter again") from None
    if not isinstance(value, dict):
        raise AdapterError(
            f"the metadata {key!r} of {quoted(header.file)} is not a JSON object; save the adapter again"
        )
    return value


def _pickle_advice(file: Path) -> str:
    return (
        f"{quoted(file)} is a pickle, which can run code when it is opened, so loratool never does; where you trust it, "
        "load it with peft.PeftModel.from_pretrained and save it again with save_pretrained"
    )
