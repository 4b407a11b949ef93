"""What a name on the command line means: a catalogued name, a path, or a Hub id, tried in that order.

A DyLoRA is named with the rank at which it is to act as ``ADAPTER@rank=4``, where that is asked for.
Anything that begins like a path (``./``, ``/``, ``~``) or ends in ``.safetensors`` or ``.st`` is a path and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.checkpoint.model import Checkpoint
from loratool.errors import AdapterError, CheckpointError, NotFoundError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.alpha import RANK, Alpha
from loratool.formats.at_rank import at_rank
from loratool.formats.identify import told_adapter
from loratool.formats.identity import AnyAdapter, Identity
from loratool.formats.lora_config import MOST_DIGITS
from loratool.hub.address import HubAddress
from loratool.library.progress import Progress, Silent
from loratool.library.user_path import HUB_ID, exists, is_plainly_a_path, user_path
from registry import AdapterRecord, BaseRecord, Registry, RegistryError, is_name, is_reference

RANK_SIGN: Final = "@rank="


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter's files, and its entry in the catalogue where it has one."""

    adapter: Adapter
    record: AdapterRecord | None
    rank: int | None = None
    hub_id: str | None = None

    @property
    def reference(self) -> str:
        """``name@version``, or of an adapter that is not catalogued its path, or ``owner/name@commit`` where it is from the
        Hub; with ``@rank=b`` where one was chosen."""
        reference = self.record.reference if self.record else self.hub_id or str(self.adapter.file)
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
    """A base's folder or file, and its entry in the catalogue where it has one.

    Of one on the Hub that is not downloaded, `headers` says what its headers do, and `path` where it would be.
    """

    path: Path
    name: str
    record: BaseRecord | None
    headers: Checkpoint | None = None

    def open(self) -> Checkpoint:
        """Its checkpoint; of one that is not downloaded, what its headers say: enough for a plan.

        Raises:
            CheckpointError: it is damaged, or no model.
        """
        return Checkpoint.open(self.path) if self.headers is None else self.headers

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say where a plan needs more of a base than its headers, which are all that is here (a quantized matrix's facts).

        Raises:
            CheckpointError: it does, or the plan itself finds the base damaged.
        """
        try:
            yield
        except CheckpointError as error:
            if self.headers is None:
                raise
            how = f"'loratool base add NAME {self.record.source if self.record else self.name} --download'"
            raise CheckpointError(
                f"a plan for base {quoted(self.name)} needs its weights, which are not downloaded; get them with {how} ({error})"
            ) from None


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter that a name means, or what is told of it where loratool does not compute it; and its entry or Hub id."""

    adapter: AnyAdapter
    record: AdapterRecord | None = None
    hub_id: str | None = None


def resolve_adapter(name: str | os.PathLike[str], registry: Registry, alpha: Alpha | None = None) -> ResolvedAdapter:
    """Find and read an adapter. One on the Hub is downloaded and checked as `pull` does, and not catalogued.

    Raises:
        UnsupportedError: loratool does not compute it; its kind, and the way out, are said.
        NotFoundError, AdapterError, HubError, RegistryError: as `find_adapter`.
    """
    found = find_adapter(name, registry, alpha)
    if isinstance(found.adapter, Identity):
        raise UnsupportedError(str(found.adapter.why_not))
    return ResolvedAdapter(found.adapter, found.record, hub_id=found.hub_id)


def find_adapter(name: str | os.PathLike[str], registry: Registry, alpha: Alpha | None = None) -> FoundAdapter:
    """Find an adapter, and read it where loratool computes it; as `resolve_adapter`.

    Raises:
        NotFoundError, AdapterError: nothing is called `name`, it cannot be read, or it says its alpha and one is given.
        HubError: it is on the Hub, and cannot be got.
        RegistryError: a version that is not catalogued is asked for.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not is_plainly_a_path(text) and is_reference(text):
        if "@" in text or registry.adapters.versions(text):
            record = registry.adapters.find(text)
            if alpha is not None:
                raise AdapterError(f"{quoted(text)} says its own alpha; leave --alpha out")
            return FoundAdapter(told_entry(record, registry), record)
        if not exists(path):
            raise no_such_adapter(text, registry)
    if not is_plainly_a_path(text) and HUB_ID.fullmatch(text) and not exists(path):
        return _adapter_on_hub(HubAddress.parse(text), registry, alpha)
    if not text or not exists(path):
        if RANK_SIGN in text:
            raise NotFoundError(
                f"there is no adapter {quoted(text)}: only merge and combine take a DyLoRA at a rank; make it an adapter "
                "of that rank with 'loratool truncate'"
            )
        raise NotFoundError(
            f"there is no adapter {quoted(text)}: neither a catalogued name nor a path; 'loratool list' shows the names"
        )
    adapter = told_adapter(path, alpha)
    return FoundAdapter(adapter, _entry_of(adapter, registry))


def no_such_adapter(reference: str, registry: Registry) -> Exception:
    """The error for ``name`` or ``name@version`` where the catalogue has no such adapter: with the nearest names, or that it
    is a base."""
    name = reference.partition("@")[0]
    if is_name(name) and not registry.adapters.versions(name) and registry.bases.get(name) is not None:
        return NotFoundError(f"{quoted(name)} is a base and no adapter; 'loratool base show {name}' shows it")
    try:
        found = registry.adapters.find(reference)
    except RegistryError as error:
        return error
    return NotFoundError(f"{found.reference} was catalogued just now; run the command again")


def no_such_base(name: str, registry: Registry) -> Exception:
    """The error for a name where the catalogue has no such base: with the nearest names, or that it is an adapter."""
    if registry.adapters.versions(name) and registry.bases.get(name) is None:
        return NotFoundError(f"{quoted(name)} is an adapter and no base; 'loratool show {name}' shows it")
    try:
        found = registry.bases.find(name)
    except RegistryError as error:
        return error
    return NotFoundError(f"base {quoted(found.name)} was catalogued just now; run the command again")


def resolve_at_rank(name: str | os.PathLike[str], registry: Registry, alpha: Alpha | None = None) -> ResolvedAdapter:
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


def resolve_base(name: str | os.PathLike[str], registry: Registry, progress: Progress | None = None, *,
                 download: bool = True) -> ResolvedBase:  # fmt: skip
    """Find the folder or file of a base model; one that is only on the Hub is downloaded, unless `download` is off.

    Raises:
        NotFoundError: nothing is called `name`, or the files of the catalogued base are gone.
        HubError: it is on the Hub, and cannot be got.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not is_plainly_a_path(text) and is_name(text):
        record = registry.bases.get(text)
        if record is not None:
            return _catalogued(record, registry, progress, download=download)
        if not exists(path):
            raise no_such_base(text, registry)
    if text and exists(path):
        return ResolvedBase(path, _name_of(path), base_at(path, registry))
    if not is_plainly_a_path(text) and HUB_ID.fullmatch(text):
        return _on_hub(text, progress, download=download)
    raise NotFoundError(
        f"there is no model {quoted(text)}: neither a catalogued name, nor a folder, nor a Hub id; "
        "'loratool base list' shows the names"
    )


def resolve_merged(name: str | os.PathLike[str], registry: Registry) -> Path:
    """Find the folder of a merged model: a path, a catalogued name, or the folder's own name of a recorded merge.

    Raises:
        NotFoundError: nothing is called `name`, it is no folder, or several merges are called so.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not (text and exists(path)):
        if is_plainly_a_path(text) or path.name != text:
            raise NotFoundError(f"there is no folder {quoted(text)}; give the folder of a merged model")
        if not is_name(text) or registry.bases.get(text) is None:
            return _recorded_merge(text, registry)
    path = resolve_base(name, registry).path
    if not path.is_dir():
        raise NotFoundError(f"{quoted(path)} is not a folder; give the folder of a merged model")
    return path


def _recorded_merge(name: str, registry: Registry) -> Path:
    """The folder called `name` that a merge which is recorded wrote, wherever it lies."""
    merges = [merge for merge in registry.merges.list() if merge.output.name == name]
    written = {merge.output for merge in merges if merge.state in ("merged", "gone")}
    here = sorted({output.resolve() for output in written if output.is_dir()})
    if len(here) == 1:
        return here[0]
    if here:
        raise NotFoundError(
            f"several merged models are called {quoted(name)}; give the path of one: {', '.join(map(quoted, here))}"
        )
    if written:
        raise NotFoundError(f"the merged model {quoted(name)} is no longer at {quoted(min(written))}; say where it is")
    raise NotFoundError(
        f"there is no merged model {quoted(name)}: neither a folder, nor a recorded merge, nor a catalogued base; give "
        "the folder of one"
    )


def pulled_from(address: HubAddress, registry: Registry) -> tuple[AdapterRecord, ...]:
    """The catalogued adapters from an address on the Hub, the newest first.

    Without a revision those of any commit; with one, those pulled at that commit. What a branch or a tag stands for only the
    Hub knows: of those there are none.
    """
    known = registry.adapters.find_by_repo(address.repo, address.path)
    if address.revision is None:
        return known
    return tuple(record for record in known if any(place.revision == address.revision for place in record.locations))


def is_here(record: AdapterRecord, registry: Registry) -> bool:
    """Whether the files of a catalogued adapter are on this disk."""
    try:
        registry.adapters.files(record)
    except RegistryError:
        return False
    return True


def _catalogued(record: BaseRecord, registry: Registry, progress: Progress | None, *, download: bool) -> ResolvedBase:
    from loratool.library.hub_bases import hub_base, is_away, known_headers, obtain

    if is_away(record):
        if not download:
            headers = known_headers(record) or hub_base(record).headers()
            return ResolvedBase(headers.path, record.name, record, headers)
        record = obtain(record, registry, progress)
    if record.path is None or not exists(record.path):
        raise NotFoundError(
            f"the files of base {quoted(record.name)} are no longer at {quoted(record.path)}; "
            f"say where they are with 'loratool base add {record.name} FOLDER'"
        )
    return ResolvedBase(record.path, record.name, record)


def _adapter_on_hub(address: HubAddress, registry: Registry, alpha: Alpha | None) -> FoundAdapter:
    """An adapter by its Hub id: as it is catalogued, if it was pulled, else out of huggingface_hub's cache or the Hub."""
    from loratool.hub.pull import pull_adapter

    for record in pulled_from(address, registry):
        if has_alpha(record, alpha) and is_here(record, registry):
            return FoundAdapter(told_entry(record, registry), record)
    try:
        pulled = pull_adapter(address, f"loratool pull {address}", alpha=alpha)
    except NotFoundError as error:
        raise NotFoundError(
            f"there is no adapter {quoted(address)}: neither a catalogued name nor a path, and as a Hub id: {error}"
        ) from None
    commit = pulled.snapshot.commit
    return FoundAdapter(pulled.adapter, _entry_of(pulled.adapter, registry), hub_id=f"{address.repo}@{commit[:12]}")


def has_alpha(record: AdapterRecord, alpha: Alpha | None) -> bool:
    """Whether a catalogued adapter acts as one that is read with an alpha that is given."""
    return record.scaling == 1 if alpha == RANK else alpha in (None, record.alpha)


def _entry_of(adapter: AnyAdapter, registry: Registry) -> AdapterRecord | None:
    """The entry of an adapter's content in the catalogue."""
    return next((each for each in registry.adapters.find_by_sha256(adapter.sha256) if is_entry_of(each, adapter)), None)


def told_entry(record: AdapterRecord, registry: Registry) -> AnyAdapter:
    """Read a catalogued adapter from the store, as it acts by its entry, under the name that it has there.

    A file that states no alpha, or two, was catalogued with one that was given. Of one that loratool does not compute, return
    what is told of it.

    Raises:
        AdapterError, registry.RegistryError: its files are gone or damaged.
    """
    folder = registry.adapters.files(record)
    problem: AdapterError | None = None
    other: AnyAdapter | None = None
    for alpha in (None, record.alpha, RANK):
        try:
            adapter = told_adapter(folder, alpha)
        except AdapterError as error:
            problem = problem or error
            continue
        if is_entry_of(record, adapter):
            return _called(record, adapter)
        other = other or adapter
    if other is None:
        raise problem or AdapterError(f"{quoted(record.reference)} cannot be read; run 'loratool doctor'")
    return _called(record, other)


def _called(record: AdapterRecord, adapter: AnyAdapter) -> AnyAdapter:
    """An adapter out of the store under the name of its entry, also where it is said why it is not computed."""
    if isinstance(adapter, Adapter):
        return replace(adapter, name=record.name)
    why_not = str(adapter.why_not)
    for source in (adapter.files.source, adapter.files.config_source):
        why_not = why_not.replace(quoted(source), quoted(record.reference))
    return replace(adapter, name=record.name, why_not=why_not)


def entry_at(path: Path, known: Sequence[AdapterRecord]) -> AdapterRecord | None:
    """Which of the entries `known` for its weights is that of the adapter at `path`, which may be without an alpha of its own.

    Raises:
        AdapterError, UnsupportedError: it cannot be read.
    """
    try:
        adapter = told_adapter(path)
    except AdapterError as problem:
        try:  # a bare file, which was catalogued with an alpha
            given: Iterator[tuple[AdapterRecord, Alpha | None]] = (
                (each, alpha) for each in known for alpha in (each.alpha, RANK)
            )
            return next((each for each, alpha in given if is_entry_of(each, told_adapter(path, alpha))), None)
        except AdapterError:
            raise problem from None
    return next((each for each in known if is_entry_of(each, adapter)), None)


def is_entry_of(record: AdapterRecord, adapter: AnyAdapter) -> bool:
    """Whether an entry is that of an adapter with the same weights: whether they have the same numbers.

    The same file acts otherwise under another configuration (alpha, rsLoRA, alpha_pattern).
    """
    return numbers_of(record) == numbers_of(adapter)


def numbers_of(adapter: AnyAdapter | AdapterRecord) -> tuple[object, ...]:
    """What decides how an adapter's weights act."""
    return adapter.kind, adapter.ranks, adapter.alpha, adapter.scaling


def _on_hub(hub_id: str, progress: Progress | None, *, download: bool) -> ResolvedBase:
    from loratool.library.hub_bases import find_hub_base

    address = HubAddress.parse(hub_id)
    base = find_hub_base(address, f"loratool base add NAME {address} --download")
    if download or base.is_here:
        return ResolvedBase(base.download(progress or Silent(), recheck=False), address.name, None)
    headers = base.headers()
    return ResolvedBase(headers.path, address.name, None, headers)


def _name_of(path: Path) -> str:
    """What a model is called by where it lies: its folder's or file's name; in the Hub's cache, its repository's."""
    real = path.resolve()
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        return real.parents[1].name.rpartition("--")[2]
    return real.stem if path.is_file() else real.name


def base_at(path: Path, registry: Registry) -> BaseRecord | None:
    """The catalogued base whose files are at `path`."""
    real = path.resolve()
    return next((base for base in registry.bases.list() if base.path is not None and base.path.resolve() == real), None)
