"""The files of an adapter that loratool does not compute, which are kept and exported unchanged."""

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
"""Source of a file's bytes: another file, the bytes themselves, or their pieces in order."""

ITS_WEIGHTS: Final = Path(WEIGHTS_NAME).stem


def kept_files(found: Identity) -> dict[str, Content]:
    """Return the files of an adapter by name: its weights, the JSON beside them, and its tokenizer.

    Shards are joined into one file. Weights are renamed to ``adapter_model`` if some file systems would not accept their name.

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
    """Return the name of an adapter's weights among its kept files."""
    if found.files.index is not None:
        return WEIGHTS_NAME
    name = found.files.weights[0].name
    return name if PLAIN.fullmatch(name) else f"{ITS_WEIGHTS}{found.files.weights[0].suffix}"


def write_kept(found: Identity, out: Path, *, force: bool = False) -> None:
    """Write the files of an adapter unchanged: a folder, or only its weights if `out` is a file name.

    Raises:
        OutputError: `out` exists (without `force`) or cannot be written, or it is a file name although the adapter has several
          files or another suffix.
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
            f"{quoted(found.name)} has {quoted(others[0])} beside its weights; give --out a folder, which holds both"
        )
    if Path(weights).suffix != out.suffix and not {Path(weights).suffix, out.suffix} <= SINGLE_FILE_SUFFIXES:
        raise OutputError(
            f"{quoted(found.name)} is kept unchanged, in a {Path(weights).suffix} file; give --out a name with that suffix, "
            "or a folder"
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
