"""Labels in the content store: small JSON files beside the entries, from which a lost catalogue can be restored.

The label of the entry `store/<key[:2]>/<key>/` is `<key>.json` beside it. It holds the catalogue's record of the entry: its
adapters, and the sha256 of its files. The label of a catalogue outside the store's home has a digest of that catalogue's URL
before `.json`, so that no two catalogues write one file. `store/bases.json` lists the bases in the same way.

A label holds the facts of one committed transaction. It is written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from registry.entry_checks import LabelError
from registry.errors import RegistryError
from registry.json_text import LARGEST_JSON, is_too_deep, json_value
from registry.plain_file import UnreadableFileError, read_plain
from registry.store import STAGING, Store, entry_key

SCHEMA = 1
BASES = "bases"


def own_suffix(store: Store, catalogue: str | None = None) -> str:
    """Return the suffix of a catalogue's labels; by default of the one that the store was opened for."""
    named = store.catalogue if catalogue is None else catalogue
    return ".json" if named == store.own_catalogue else f".{hashlib.sha256(named.encode()).hexdigest()[:16]}.json"


def label_path(store: Store, key: str, suffix: str) -> Path:
    """Return the path of an entry's label, or with the key `BASES` of the list of bases."""
    return (store.root if key == BASES else store.root / key[:2]) / f"{key}{suffix}"


def draft_path(store: Store) -> Path:
    """Return the temporary path of a label before it is renamed."""
    return store.root / STAGING / f"label{own_suffix(store)}"


def read_label(path: Path) -> dict[str, Any] | None:
    """Return the content of a label; None if it does not exist.

    Raises:
        ValueError: it is not a valid label: not a regular file, too large, nested too deeply, not JSON, of another schema,
            or with text or numbers that no database stores.
            The message of a `LabelError` or an `UnreadableFileError` says why.
    """
    data = read_plain(path, LARGEST_JSON)
    if data is None:
        return None
    value = json_value(data.decode())
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # databases store no lone surrogate and no NaN
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise LabelError(f"it does not have schema {SCHEMA}")
    return value


def write_label(store: Store, path: Path, value: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a label atomically. Call it in a write transaction. Without `durable`, a power cut may lose it.

    Raises:
        OSError: it cannot be written.
        RegistryError: it would be too large to be read again.
    """
    text = json.dumps({"schema": SCHEMA, **value}, sort_keys=True, indent=1, ensure_ascii=False)
    if len(text) > LARGEST_JSON or is_too_deep(value):
        raise RegistryError(
            f"the label '{path}' would be too large to be read again; make the adapter's configuration smaller"
        )
    data = (text + "\n").encode()
    with suppress(UnreadableFileError):
        if read_plain(path, LARGEST_JSON) == data:
            return
    store.folder(path.parent.name if path.parent != store.root else "")
    store.folder(STAGING)
    draft = draft_path(store)
    draft.unlink(missing_ok=True)  # left by a killed process: writers of labels hold the catalogue's write lock
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(descriptor)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def remove_label(path: Path) -> None:
    """Remove a label, if it exists."""
    with suppress(FileNotFoundError):
        path.unlink()


def labels_of(store: Store, key: str) -> Iterator[Path]:
    """Yield the paths of an entry's labels, of all catalogues."""
    shard = label_path(store, key, "").parent
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from sorted(
            path for path in shard.iterdir() if path.name.startswith(f"{key}.") and path.suffix == ".json"
        )


def listing(value: Mapping[str, Any] | None, key: str) -> dict[str, str] | None:
    """Return the sha256 of an entry's files by name, from its label; None if the label lacks them or they do not fit `key`."""
    files = None if value is None else value.get("files")
    if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
        return None
    return files if entry_key(files) == key else None
