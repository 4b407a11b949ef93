"""What a name on the command line means: a catalogued name, a path, or a Hub id, tried in that order.

A DyLoRA is named with the rank at which it is to act as ``ADAPTER@rank=4``, where that is asked for.
Anything that begins like a path (``./``, ``/``, ``~``) or ends in ``.safetensors`` or ``.st`` is a path and nothing else.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.checkpoint.fingerprint import DigestCache
from loratool.errors import AdapterError, NotFoundError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.dylora import at_rank
from loratool.formats.lora_config import MOST_DIGITS
from loratool.formats.read import SINGLE_FILE_SUFFIXES, read_adapter
from loratool.training.data import KEYS, SUFFIXES, Data, read_data, read_rows
from registry import AdapterRecord, BaseRecord, Registry, home, is_name, is_reference, registry_url

RANK_SIGN: Final = "@rank="
DATA_SET: Final = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII
)
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter's files, and its entry in the catalogue where it has one."""

    adapter: Adapter
    record: AdapterRecord | None
    rank: int | None = None

    @property
    def reference(self) -> str:
        """``name@version``, or the path of an adapter that is not catalogued; with ``@rank=b`` where one was chosen."""
        reference = self.record.reference if self.record else str(self.adapter.file)
        return reference if self.rank is None else f"{reference}{RANK_SIGN}{self.rank}"

    @property
    def label(self) -> str:
        """A word for it in the names of files: ``dylora``, or ``dylora-r4`` where a rank was chosen."""
        name = self.record.name if self.record else self.adapter.name
        return name if self.rank is None else f"{name}-r{self.rank}"

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of its base, as the catalogue or else the file records it."""
        recorded = self.record.base_fingerprint if self.record else None
        return recorded or self.adapter.base_fingerprint


@dataclass(frozen=True, slots=True)
class ResolvedBase:
    """A base's folder or file, and its entry in the catalogue where it has one."""

    path: Path
    name: str
    record: BaseRecord | None


def open_registry(url: str | None = None, *, read_only: bool = False) -> Registry:
    """The catalogue: at `url`, at LORATOOL_REGISTRY, or in the home folder."""
    return Registry.open(home(), url or registry_url(), read_only=read_only)


def digest_cache() -> DigestCache:
    """The cache of tensors' digests, in the home folder."""
    return DigestCache(home() / "digests")


def resolve_adapter(name: str | os.PathLike[str], registry: Registry, alpha: float | None = None) -> ResolvedAdapter:
    """Find and read an adapter.

    Raises:
        NotFoundError, AdapterError: nothing is called `name`, it cannot be read, or it says its alpha and one is given.
        RegistryError: a version that is not catalogued is asked for.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not _is_plainly_a_path(text) and is_reference(text):
        if "@" in text or registry.adapters.versions(text):
            record = registry.adapters.find(text)
            if alpha is not None:
                raise AdapterError(f"{quoted(text)} says its own alpha; leave --alpha out")
            # Its folder in the store has no name that a user would know.
            return ResolvedAdapter(replace(read_adapter(registry.adapters.files(record)), name=record.name), record)
        if not exists(path):
            registry.adapters.find(text)  # raises, with the nearest names
    if not text or not exists(path):
        if RANK_SIGN in text:
            raise NotFoundError(
                f"there is no adapter {quoted(text)}: only merge and combine take a DyLoRA at a rank; make it an adapter "
                "of that rank with 'loratool truncate'"
            )
        raise NotFoundError(
            f"there is no adapter {quoted(text)}: neither a catalogued name nor a path; 'loratool list' shows the names"
        )
    adapter = read_adapter(path, alpha)
    known = registry.adapters.find_by_sha256(adapter.sha256)
    return ResolvedAdapter(adapter, next((record for record in known if record.alpha == adapter.alpha), None))


def resolve_at_rank(name: str | os.PathLike[str], registry: Registry, alpha: float | None = None) -> ResolvedAdapter:
    """The same, and of ``ADAPTER@rank=b`` the DyLoRA as it acts at rank b.

    Raises:
        AdapterError: b is no rank of it, or it is no DyLoRA; and as `resolve_adapter`.
    """
    reference, sign, rank = os.fspath(name).rpartition(RANK_SIGN)
    if not sign or exists(user_path(name)):
        return resolve_adapter(name, registry, alpha)
    if not rank.isdecimal() or len(rank) > MOST_DIGITS:
        raise AdapterError(f"{quoted(rank, 40)} in {quoted(name)} is no rank; write ADAPTER{RANK_SIGN}4")
    found = resolve_adapter(reference, registry, alpha)
    return replace(found, adapter=at_rank(found.adapter, int(rank)), rank=int(rank))


def resolve_base(name: str | os.PathLike[str], registry: Registry) -> ResolvedBase:
    """Find the folder or file of a base model.

    Raises:
        NotFoundError: nothing is called `name`, or the files of the catalogued base are gone.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not _is_plainly_a_path(text) and is_name(text):
        record = registry.bases.get(text)
        if record is not None:
            return _catalogued(record)
        if not exists(path):
            registry.bases.find(text)  # raises, with the nearest names
    if text and exists(path):
        return ResolvedBase(path, path.resolve().stem if path.is_file() else path.resolve().name, _at(path, registry))
    if not _is_plainly_a_path(text) and HUB_ID.fullmatch(text):
        repo, path = fetch_from_hub(text)
        return ResolvedBase(path, repo.rsplit("/", 1)[-1], None)
    raise NotFoundError(
        f"there is no model {quoted(text)}: neither a catalogued name, nor a folder, nor a Hub id; "
        "'loratool base list' shows the names"
    )


def resolve_merged(name: str | os.PathLike[str], registry: Registry) -> Path:
    """Find the folder of a merged model: a path, or a catalogued name.

    Raises:
        NotFoundError: nothing is called `name`, or it is no folder.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not (text and exists(path)) and (_is_plainly_a_path(text) or not is_name(text)):
        raise NotFoundError(f"there is no folder {quoted(text)}; give the folder of a merged model")
    path = resolve_base(name, registry).path
    if not path.is_dir():
        raise NotFoundError(f"{quoted(path)} is not a folder; give the folder of a merged model")
    return path


def resolve_data(name: str | os.PathLike[str]) -> Data:
    """Read a file of samples, or a data set of the Hub: ``owner/name``, ``owner/name:split``, ``owner/name@revision:split``.

    Raises:
        NotFoundError: it is neither.
        DataError: it cannot be read, or one of its lines or rows, which is named, is no sample.
    """
    text = os.fspath(name)
    path = user_path(text)
    of_hub = None if _is_plainly_a_path(text) or path.suffix.lower() in SUFFIXES else DATA_SET.fullmatch(text)
    if of_hub is None or exists(path):
        return read_data(path)
    from loratool.hub.data_sets import fetch_table

    table = fetch_table(of_hub["repo"], of_hub["split"], columns=KEYS, revision=of_hub["revision"])
    return read_rows(Path(text), table.columns, table.rows)


def fetch_from_hub(hub_id: str) -> tuple[str, Path]:
    """The repository of ``owner/name`` or ``owner/name@revision``, and the folder of its files.

    Raises:
        NotFoundError: the Hub has no such repository or revision, or cannot be reached.
    """
    from loratool.hub.bases import fetch_base

    repo, _, revision = hub_id.partition("@")
    try:
        return repo, fetch_base(repo, revision or None)
    except NotFoundError as error:
        raise NotFoundError(f"there is no folder {quoted(hub_id)}, and as a Hub id {error}") from None


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user means, with a leading ``~`` or ``~name`` replaced where there is such a home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path) -> bool:
    """Whether something is at `path`; a name that no file can have (too long, a zero byte) has nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _catalogued(record: BaseRecord) -> ResolvedBase:
    if record.path is None or not exists(record.path):
        raise NotFoundError(
            f"the files of base {quoted(record.name)} are no longer at {quoted(record.path)}; "
            f"say where they are with 'loratool base add {record.name} FOLDER'"
        )
    return ResolvedBase(record.path, record.name, record)


def _at(path: Path, registry: Registry) -> BaseRecord | None:
    real = path.resolve()
    return next((base for base in registry.bases.list() if base.path is not None and base.path.resolve() == real), None)


def _is_plainly_a_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or Path(text).suffix in SINGLE_FILE_SUFFIXES
