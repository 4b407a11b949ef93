"""Kinds of output. Each output records that loratool wrote it and what it is, and only the same kind may replace it.

Models and adapter folders record it in ``loratool.json``, adapter files and pictures in their metadata, training logs in
their first line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, NoReturn

from loratool.checkpoint.header import read_header
from loratool.checkpoint.json_text import LARGEST_LISTING, parse_json, read_json_object
from loratool.errors import CheckpointError, quoted

# The same names stand in packages that this one must not import: the merge's manifest, the adapter's facts.
OWN_FILE: Final = "loratool.json"
OWN_METADATA: Final = "loratool"
UNDO_FOLDER: Final = "loratool-undo"
"""Folder in a merged model for undo files and their adapters."""

ADAPTER_FILES: Final = frozenset({"adapter_config.json", "adapter_model.safetensors"})
WEIGHT_SUFFIXES: Final = (".safetensors", ".safetensors.index.json")

PICTURE_MARKS: Final[Mapping[str, bytes]] = {
    ".pdf": b"/Creator (loratool)",
    ".png": b"Software\0loratool",
    ".svg": b"<dc:title>loratool</dc:title>",
}
"""Bytes that occur near the beginning or the end of a picture that loratool drew, by suffix."""

NEAR_BYTES: Final = 4096
LOG_LINE_BYTES: Final = 1 << 20


class OutputKind(Enum):
    """The kind of an output. The value is a noun phrase for messages."""

    MERGED_MODEL = "a merged model"
    QUANTIZED_MODEL = "a quantized model"
    ADAPTER_FOLDER = "an adapter's folder"
    ADAPTER_FILE = "an adapter's file"
    PICTURE = "a picture"
    TRAINING_LOG = "a training log"
    OWN_RECORD = "a record of its own"
    """A file in loratool's home folder, where no other program writes."""

    @property
    def is_folder(self) -> bool:
        return self in _FOLDERS


_FOLDERS: Final = {OutputKind.MERGED_MODEL, OutputKind.QUANTIZED_MODEL, OutputKind.ADAPTER_FOLDER}
_MODELS: Final = {"merge": OutputKind.MERGED_MODEL, "quantization": OutputKind.QUANTIZED_MODEL}


def why_not_replaced(path: Path, kind: OutputKind) -> str | None:
    """Return why an output of this kind must not replace the file or folder at `path`; None if it may.

    Raises:
        OSError: it cannot be accessed.
    """
    if path.is_symlink():
        return "is a link, which loratool never writes through"
    if Path.cwd().is_relative_to(os.path.abspath(path)):
        return "holds the current working folder"
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode):
        return _why_not_folder(path, kind)
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if kind.is_folder:
        return f"is a file, and the output is {kind.value}, a folder"
    if status.st_size == 0 or kind is OutputKind.OWN_RECORD:
        return None
    return _why_other(_kind_of_file(path), kind, "file")


def _why_not_folder(folder: Path, kind: OutputKind) -> str | None:
    if not kind.is_folder:
        return f"is a folder, and the output is {kind.value}, a file"
    if not any(folder.iterdir()):
        return None
    if not (folder / OWN_FILE).is_file():
        return "is a folder that loratool did not write"
    record = _record_of(folder)
    if record is None:
        return f"has a {OWN_FILE} that loratool did not write"
    if record.get("in_place"):
        return "is a model of your own that was changed in place"
    why = _why_other(_kind_of_record(record), kind, "folder")
    foreign = next((name for name in _names_in(folder) if not _is_accounted_for(name, record)), None)
    return why or (None if foreign is None else f"holds {quoted(foreign)}, which loratool did not write")


def _why_other(found: OutputKind | None, kind: OutputKind, what: str) -> str | None:
    if found is None:
        return f"is a {what} that loratool did not write"
    return None if found is kind else f"is {found.value}, and the output is {kind.value}"


def _record_of(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``loratool.json`` in `folder`; None if loratool did not write it."""
    try:
        record = read_json_object(folder / OWN_FILE, LARGEST_LISTING)
    except CheckpointError:
        return None
    return None if _kind_of_record(record) is None else record


def _kind_of_record(record: Mapping[str, Any]) -> OutputKind | None:
    """Return the kind of a folder from its ``loratool.json``.

    A manifest's ``kind`` is ``merge`` or ``quantization``. An adapter's facts name the kind of its updates there.
    """
    if not isinstance(record.get("kind"), str):
        return None
    return _MODELS.get(record["kind"], OutputKind.ADAPTER_FOLDER)


def _kind_of_file(file: Path) -> OutputKind | None:
    if file.suffix in {".safetensors", ".st"}:
        try:
            is_ours = OWN_METADATA in read_header(file).metadata
        except CheckpointError:
            is_ours = False
        return OutputKind.ADAPTER_FILE if is_ours else None
    if file.suffix in PICTURE_MARKS:
        return OutputKind.PICTURE if PICTURE_MARKS[file.suffix] in _ends_of(file) else None
    return OutputKind.TRAINING_LOG if _begins_as_log(file) else None


def _ends_of(file: Path) -> bytes:
    """Return the first and the last `NEAR_BYTES` bytes of a file."""
    with open(file, "rb") as stream:
        first = stream.read(NEAR_BYTES)
        stream.seek(max(len(first), stream.seek(0, os.SEEK_END) - NEAR_BYTES))
        return first + stream.read(NEAR_BYTES)


def _begins_as_log(file: Path) -> bool:
    with open(file, "rb") as stream:
        line = stream.readline(LOG_LINE_BYTES)
    try:
        entry = parse_json(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and {"recipe", "versions"} <= entry.keys()


def _names_in(folder: Path) -> Iterator[str]:
    """Yield the relative paths below `folder` of files and links, in order.

    Raises:
        OSError: a folder cannot be read.
    """

    def stop(error: OSError) -> NoReturn:
        raise error

    for root, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield str((Path(root) / name).relative_to(folder))


def _is_accounted_for(name: str, record: Mapping[str, Any]) -> bool:
    """Return whether a file in an output's folder belongs to the output."""
    if name == OWN_FILE:
        return True
    files = record.get("files")
    if _kind_of_record(record) is OutputKind.ADAPTER_FOLDER:
        return name in ADAPTER_FILES or (isinstance(files, list) and name in files)
    is_weights = "/" not in name and name.endswith(WEIGHT_SUFFIXES)
    return is_weights or name.startswith(f"{UNDO_FOLDER}/") or (isinstance(files, dict) and name in files)
