"""The files of an adapter that loratool does not compute, which are kept and given back as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loratool.checkpoint.file_state import refuse_changed_meanwhile
from loratool.checkpoint.json_text import read_json_object
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import staged_file, staged_folder
from loratool.errors import AdapterError, CheckpointError, OutputError, quoted
from loratool.formats.adapter_folder import PLAIN, tokenizer_files
from loratool.formats.adapter_names import FACTS_NAME, SINGLE_FILE_SUFFIXES, WEIGHT_SUFFIXES, WEIGHTS_NAME
from loratool.formats.identity import Identity

Content = Path | bytes | Iterator[bytes]
"""Where the bytes of a file come from: a file, themselves, or their pieces in order."""

ITS_WEIGHTS: Final = Path(WEIGHTS_NAME).stem


def kept_files(found: Identity) -> dict[str, Content]:
    """Return the files of an adapter by their names: its weights, the JSON that belongs beside them, and its tokenizer.

    Shards are joined to one file. Weights whose name not every file system takes are called ``adapter_model``.

    Raises:
        AdapterError: JSON beside it is damaged.
    """
    files: dict[str, Content] = dict(found.files.beside)
    for file in found.files.beside.values():
        try:
            read_json_object(file)
        except CheckpointError as error:
            raise AdapterError(str(error)) from None
    if found.facts and found.facts != found.files.facts:
        text = json.dumps(found.facts, sort_keys=True, indent=2, ensure_ascii=False)
        files[FACTS_NAME] = f"{text}\n".encode()
    return {weights_name(found): _weights(found), **files, **tokenizer_files(found)}


def weights_name(found: Identity) -> str:
    """Return what the weights of an adapter are called among its kept files."""
    if found.files.index is not None:
        return WEIGHTS_NAME
    name = found.files.weights[0].name
    return name if PLAIN.fullmatch(name) else f"{ITS_WEIGHTS}{found.files.weights[0].suffix}"


def write_kept(found: Identity, out: Path, *, force: bool = False) -> None:
    """Write the files of an adapter as they are: a folder of them, or its weights where `out` is a file's name.

    Raises:
        OutputError: `out` exists (without `force`), cannot be written, or is a file where the adapter is several, or one of
            another suffix.
        AdapterError, CheckpointError: the files are damaged, or changed meanwhile.
    """
    files = kept_files(found)
    weights = weights_name(found)
    if out.suffix not in WEIGHT_SUFFIXES:
        with staged_folder(out, OutputKind.ADAPTER_FOLDER, force=force) as folder:
            for name, content in files.items():
                _write(folder / name, content)
            refuse_changed_meanwhile(found.states)
        return
    others = [name for name in files if name not in (weights, FACTS_NAME)]
    if others:
        raise OutputError(
            f"{quoted(found.name)} has {quoted(others[0])} beside its weights, which no single file holds; give --out a folder"
        )
    if Path(weights).suffix != out.suffix and not {Path(weights).suffix, out.suffix} <= SINGLE_FILE_SUFFIXES:
        raise OutputError(
            f"{quoted(found.name)} is kept as it is, in a {Path(weights).suffix} file; give --out a name that ends so, or a "
            "folder"
        )
    with staged_file(out, OutputKind.ADAPTER_FILE, force=force) as file:
        _write(file, files[weights])
        refuse_changed_meanwhile(found.states)


def _weights(found: Identity) -> Content:
    return found.files.weights[0] if found.files.index is None else found.files.content()


def _write(file: Path, content: Content) -> None:
    with open(file, "wb") as target:
        if isinstance(content, bytes):
            target.write(content)
        elif isinstance(content, Path):
            with open(content, "rb") as source:
                while piece := source.read(1 << 20):
                    target.write(piece)
        else:
            target.writelines(content)
