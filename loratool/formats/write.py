"""Write an adapter as a PEFT directory or a single file. The factors' bytes are copied unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.architecture import module_of
from loratool.checkpoint.copying import copy_range
from loratool.checkpoint.file_state import refuse_changed_meanwhile
from loratool.checkpoint.header import TensorInfo, header_bytes
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import staged_file, staged_folder, sync_file, sync_tree
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_names import (
    CONFIG_KEY,
    CONFIG_NAME,
    FACTS_KEY,
    FACTS_NAME,
    SINGLE_FILE_SUFFIXES,
    WEIGHTS_NAME,
)
from loratool.formats.beside import BESIDE
from loratool.formats.builders import BUILDERS
from loratool.formats.expert_factors import wrapping_modules
from loratool.formats.facts import with_files
from loratool.formats.read import read_adapter
from loratool.formats.replacements import peft_name
from loratool.formats.table import format_named
from loratool.updates.replacement import WHOLE


def write_peft(adapter: Adapter, out: Path, *, force: bool = False, keep_metadata: bool = True,
               beside: Mapping[str, Path] | None = None) -> None:  # fmt: skip
    """Write the PEFT directory `out`: configuration, weights, and ``loratool.json`` if there are facts.

    A file whose tensors already have PEFT's names is copied byte for byte, which keeps its sha256. Without `keep_metadata` it
    is rewritten with only its tensors. The files `beside`, by name, are copied; the facts list them.

    Raises:
        OutputError: `out` exists (without `force`) or cannot be written.
        CheckpointError: a file of the adapter changed meanwhile.
    """
    if beside:
        adapter = replace(adapter, facts=with_files(adapter.facts, beside))
    with staged_folder(out, OutputKind.ADAPTER_FOLDER, force=force) as folder:
        _fill_folder(folder, adapter, keep_metadata=keep_metadata)
        for name, file in (beside or {}).items():
            _copy_file(file, folder / name)


def write_single_file(adapter: Adapter, out: Path, *, force: bool = False) -> None:
    """Write the safetensors file `out`, with the configuration and loratool's facts in its metadata.

    An adapter that was read in another layout that loratool can write keeps that layout.

    Raises:
        OutputError: `out` exists (without `force`) or cannot be written.
        CheckpointError: a file of the adapter changed meanwhile.
    """
    with staged_file(out, OutputKind.ADAPTER_FILE, force=force) as file:
        _fill_file(file, adapter)


def adapter_output(out: Path) -> OutputKind:
    """Return the kind of output at `out`: a single file (``.safetensors``, ``.st``) or a PEFT directory."""
    return OutputKind.ADAPTER_FILE if out.suffix in SINGLE_FILE_SUFFIXES else OutputKind.ADAPTER_FOLDER


@contextmanager
def staged_adapter(adapter: Adapter, out: Path, *, force: bool = False) -> Iterator[Adapter]:
    """Write a single file (``.safetensors``, ``.st``) or a PEFT directory, and yield the adapter read back from it.

    The output is durable, beside `out`, and is renamed to `out` when the block ends without an error.

    Raises:
        OutputError: `out` exists (without `force`) or cannot be written.
    """
    kind = adapter_output(out)
    if kind is OutputKind.ADAPTER_FILE:
        with staged_file(out, kind, force=force) as file:
            _fill_file(file, adapter)
            sync_file(file)
            yield read_adapter(file)
    else:
        with staged_folder(out, kind, force=force) as folder:
            _fill_folder(folder, adapter)
            sync_tree(folder)
            yield read_adapter(folder)


def _fill_folder(folder: Path, adapter: Adapter, *, keep_metadata: bool = True) -> None:
    tensors = _tensors(adapter)
    target = folder / WEIGHTS_NAME
    lies_as_it_is = all(name == info.name and info.file == adapter.file for name, info in tensors.items())
    if keep_metadata and lies_as_it_is:
        _copy_file(adapter.file, target)
    else:
        _write_tensors(target, tensors, {"format": "pt"})
    (folder / CONFIG_NAME).write_text(_pretty(adapter.config), encoding="utf-8")
    if adapter.facts:
        (folder / FACTS_NAME).write_text(_pretty(adapter.facts), encoding="utf-8")
    refuse_changed_meanwhile(adapter.states)


def _fill_file(file: Path, adapter: Adapter) -> None:
    write = None if adapter.layout is None else format_named(adapter.layout.format).write
    tensors: Mapping[str, TensorInfo | bytes]
    if write is None:
        tensors, metadata = _tensors(adapter), {"format": "pt", CONFIG_KEY: _compact(adapter.config)}
    else:
        tensors, metadata = write(adapter)
    if adapter.facts:
        metadata[FACTS_KEY] = _compact(adapter.facts)
    _write_tensors(file, tensors, metadata)
    refuse_changed_meanwhile(adapter.states)


def _tensors(adapter: Adapter) -> dict[str, TensorInfo]:
    keys = {name: feature.key for name, feature in BESIDE.items()}
    modules, factors, whole = wrapping_modules(adapter), {}, {}
    for name, update in sorted(adapter.changes.items()):
        for letter, info in update.tensors.items():
            if update.kind == WHOLE:
                whole[peft_name(name, adapter)] = info
            else:
                key = keys.get(update.kind, BUILDERS[adapter.kind].key)
                part = name.rpartition(".")[2] if update.replaces else letter
                factors[key(modules.get(name) or module_of(name), part)] = info
    whole |= {peft_name(name, adapter): info for name, info in adapter.own_base.items()}
    return factors | whole


def _write_tensors(file: Path, tensors: Mapping[str, TensorInfo | bytes], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Each tensor is copied from its file, or is one fp32 number given as bytes."""
    shapes = {name: ("F32", ()) if isinstance(t, bytes) else (t.dtype, t.shape) for name, t in tensors.items()}
    head = header_bytes(shapes, metadata)
    with open(file, "wb") as target:
        target.write(head)
        for tensor in tensors.values():
            if isinstance(tensor, bytes):
                target.write(tensor)
                continue
            target.flush()
            at = target.tell()
            with open(tensor.file, "rb") as source:
                copy_range(source.fileno(), target.fileno(), tensor.start, tensor.stop, at=at)
            target.seek(at + tensor.nbytes)


def _copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        copy_range(reader.fileno(), writer.fileno(), 0, os.fstat(reader.fileno()).st_size)


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
