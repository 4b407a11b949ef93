"""Resolution of a name on the command line: as a catalogued name, a path, or a Hub id, in this order.

Where a command allows it, ``ADAPTER@rank=4`` is a DyLoRA at rank 4. A name that begins like a path (``./``, ``/``, ``~``) or
ends in ``.safetensors`` or ``.st`` is always a path.
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
from loratool.formats.identify import read_or_identify
from loratool.formats.identity import AnyAdapter, Identity
from loratool.formats.module_targets import MOST_DIGITS
from loratool.hub.address import HubAddress
from loratool.library.places.user_path import HUB_ID, exists, is_plainly_a_path, taken_for_hub_id, user_path
from loratool.library.reporting.progress import Progress, Silent
from registry import AdapterRecord, BaseRecord, Registry, RegistryError, is_name, is_reference

RANK_SIGN: Final = "@rank="


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter's files, and its entry in the catalogue if it has one."""

    adapter: Adapter
    record: AdapterRecord | None
    rank: int | None = None
    hub_id: str | None = None

    @property
    def reference(self) -> str:
        """``name@version``; for an uncatalogued adapter its path, or ``owner/name@commit`` if it is from the Hub.

        ``@rank=b`` is added if a rank was chosen.
        """
        reference = self.record.reference if self.record else self.hub_id or str(self.adapter.file)
        return reference if self.rank is None else f"{reference}{RANK_SIGN}{self.rank}"

    @property
    def label(self) -> str:
        """Its name for names of files: ``dylora``, or ``dylora-r4`` if a rank was chosen."""
        name = self.record.name if self.record else self.adapter.name
        return name if self.rank is None else f"{name}-r{self.rank}"

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of its base, from the catalogue or else from the file."""
        recorded = self.record.base_fingerprint if self.record else None
        return recorded or self.adapter.base_fingerprint


@dataclass(frozen=True, slots=True)
class ResolvedBase:
    """A base's folder or file, and its entry in the catalogue if it has one.

    For a base on the Hub that is not downloaded, `headers` holds its headers, and `path` is its future path.
    """

    path: Path
    name: str
    record: BaseRecord | None
    headers: Checkpoint | None = None

    def open(self) -> Checkpoint:
        """Return its checkpoint, or the headers if it is not downloaded, which suffice for a plan.

        Raises:
            CheckpointError: it is damaged or not a model.
        """
        return Checkpoint.open(self.path) if self.headers is None else self.headers

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Explain errors of a plan that needs more than the headers of a base that is not downloaded.

        Raises:
            CheckpointError: the plan needs its weights (facts of a quantized matrix), or the base is damaged.
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
    """The adapter that a name refers to, or its identity if loratool does not compute it, with its entry or Hub id."""

    adapter: AnyAdapter
    record: AdapterRecord | None = None
    hub_id: str | None = None


def resolve_adapter(name: str | os.PathLike[str], registry: Registry, alpha: Alpha | None = None) -> ResolvedAdapter:
    """Find and read an adapter. An adapter on the Hub is downloaded and checked as by `pull`, but not catalogued.

    Raises:
        UnsupportedError: loratool does not compute it; the message names its kind and what to do.
        NotFoundError, AdapterError, HubError, RegistryError: as `find_adapter`.
    """
    found = find_adapter(name, registry, alpha)
    if isinstance(found.adapter, Identity):
        raise UnsupportedError(str(found.adapter.why_not))
    return ResolvedAdapter(found.adapter, found.record, hub_id=found.hub_id)


def find_adapter(name: str | os.PathLike[str], registry: Registry, alpha: Alpha | None = None) -> FoundAdapter:
    """Find an adapter as `resolve_adapter` does, and read it if loratool computes it.

    Raises:
        NotFoundError, AdapterError: there is no adapter `name`, it cannot be read, or it states its alpha and `alpha` is given.
        HubError: it is on the Hub and cannot be downloaded.
        RegistryError: the version is not catalogued.
    """
    text = os.fspath(name)
    path = user_path(text)
    if not is_plainly_a_path(text) and is_reference(text):
        if "@" in text or registry.adapters.versions(text):
            record = registry.adapters.find(text)
            if alpha is not None:
                raise AdapterError(f"{quoted(text)} states its own alpha; leave --alpha out")
            return FoundAdapter(adapter_of_entry(record, registry), record)
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
    adapter = read_or_identify(path, alpha)
    return FoundAdapter(adapter, _entry_of(adapter, registry))


def no_such_adapter(reference: str, registry: Registry) -> Exception:
    """Return the error for an adapter that the catalogue lacks, with the nearest names, or the hint that it is a base.

    `reference` is ``name`` or ``name@version``.
    """
    name = reference.partition("@")[0]
    if is_name(name) and not registry.adapters.versions(name) and registry.bases.get(name) is not None:
        return NotFoundError(f"{quoted(name)} is a base, not an adapter; 'loratool base show {name}' shows it")
    try:
        found = registry.adapters.find(reference)
    except RegistryError as error:
        return error
    return NotFoundError(f"{found.reference} was catalogued just now; run the command again")


def no_such_base(name: str, registry: Registry) -> Exception:
    """Return the error for a base that the catalogue lacks, with the nearest names, or the hint that it is an adapter."""
    if registry.adapters.versions(name) and registry.bases.get(name) is None:
        return NotFoundError(f"{quoted(name)} is an adapter, not a base; 'loratool show {name}' shows it")
    try:
        found = registry.bases.find(name)
    except RegistryError as error:
        return error
    return NotFoundError(f"base {quoted(found.name)} was catalogued just now; run the command again")


def resolve_at_rank(name: str | os.PathLike[str], registry: Registry, alpha: Alpha | None = None) -> ResolvedAdapter:
    """Find and read an adapter as `resolve_adapter` does; ``ADAPTER@rank=b`` is a DyLoRA cut to rank b.

    Raises:
        AdapterError: b is not one of its ranks, or it is not a DyLoRA; and as `resolve_adapter`.
    """
    reference, sign, rank = os.fspath(name).rpartition(RANK_SIGN)
    if not sign or exists(user_path(name)):
        return resolve_adapter(name, registry, alpha)
    if not rank.isdecimal() or len(rank) > MOST_DIGITS:
        raise AdapterError(f"{quoted(rank, 40)} in {quoted(name)} is not a rank; write ADAPTER{RANK_SIGN}4")
    found = resolve_adapter(reference, registry, alpha)
    return replace(found, adapter=at_rank(found.adapter, int(rank)), rank=int(rank))


def resolve_base(name: str | os.PathLike[str], registry: Registry, progress: Progress | None = None, *,
                 download: bool = True) -> ResolvedBase:  # fmt: skip
    """Find the folder or file of a base model. A base that is only on the Hub is downloaded, unless `download` is off.

    Raises:
        NotFoundError: there is no base `name`, or the files of the catalogued base are gone.
        HubError: it is on the Hub and cannot be downloaded.
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
        NotFoundError: there is no model `name`, it is not a folder, or several merges have the name.
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
    """Return the output folder of the recorded merge whose folder is called `name`."""
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
    """Return the catalogued adapters from an address on the Hub, newest first.

    The revision must be a commit to match; an address without one matches all commits. A branch or a tag matches none, since
    only the Hub knows its commit.
    """
    known = registry.adapters.find_by_repo(address.repo, address.path)
    if address.revision is None:
        return known
    return tuple(record for record in known if any(place.revision == address.revision for place in record.locations))


def is_here(record: AdapterRecord, registry: Registry) -> bool:
    """Return whether the files of a catalogued adapter are on this disk."""
    try:
        registry.adapters.files(record)
    except RegistryError:
        return False
    return True


def _catalogued(record: BaseRecord, registry: Registry, progress: Progress | None, *, download: bool) -> ResolvedBase:
    from loratool.library.resolving.hub_bases import hub_base, is_away, known_headers, obtain

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
    """Return the adapter of a Hub id: from the catalogue if it was pulled, else from huggingface_hub's cache or the Hub."""
    from loratool.hub.pull import pull_adapter

    for record in pulled_from(address, registry):
        if has_alpha(record, alpha) and is_here(record, registry):
            return FoundAdapter(adapter_of_entry(record, registry), record)
    try:
        with taken_for_hub_id(str(address)):
            pulled = pull_adapter(address, f"loratool pull {address}", alpha=alpha)
    except NotFoundError as error:
        raise NotFoundError(
            f"there is no adapter {quoted(address)}: neither a catalogued name nor a path, and as a Hub id: {error}"
        ) from None
    commit = pulled.snapshot.commit
    return FoundAdapter(pulled.adapter, _entry_of(pulled.adapter, registry), hub_id=f"{address.repo}@{commit[:12]}")


def has_alpha(record: AdapterRecord, alpha: Alpha | None) -> bool:
    """Return whether a catalogued adapter has the given alpha (None: any)."""
    return record.scaling == 1 if alpha == RANK else alpha in (None, record.alpha)


def _entry_of(adapter: AnyAdapter, registry: Registry) -> AdapterRecord | None:
    """Return the catalogue's entry of exactly this adapter, if any."""
    return next((each for each in registry.adapters.find_by_sha256(adapter.sha256) if is_entry_of(each, adapter)), None)


def adapter_of_entry(record: AdapterRecord, registry: Registry) -> AnyAdapter:
    """Read a catalogued adapter from the store, with the numbers and the name of its entry.

    A file that states no alpha, or two, was catalogued with a given one. For an adapter that loratool does not compute, return
    its identity.

    Raises:
        AdapterError, registry.RegistryError: its files are gone or damaged.
    """
    folder = registry.adapters.files(record)
    problem: AdapterError | None = None
    other: AnyAdapter | None = None
    for alpha in (None, record.alpha, RANK):
        try:
            adapter = read_or_identify(folder, alpha)
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
    """Return an adapter from the store under the name of its entry, also in the reason why it is not computed."""
    if isinstance(adapter, Adapter):
        return replace(adapter, name=record.name)
    why_not = str(adapter.why_not)
    for source in (adapter.files.source, adapter.files.config_source):
        why_not = why_not.replace(quoted(source), quoted(record.reference))
    return replace(adapter, name=record.name, why_not=why_not)


def entry_at(path: Path, known: Sequence[AdapterRecord]) -> AdapterRecord | None:
    """Return the entry of the adapter at `path` among the entries `known` for its weights. It may not state its alpha.

    Raises:
        AdapterError, UnsupportedError: it cannot be read.
    """
    try:
        adapter = read_or_identify(path)
    except AdapterError as problem:
        try:  # a bare file, which was catalogued with an alpha
            given: Iterator[tuple[AdapterRecord, Alpha | None]] = (
                (each, alpha) for each in known for alpha in (each.alpha, RANK)
            )
            return next((each for each, alpha in given if is_entry_of(each, read_or_identify(path, alpha))), None)
        except AdapterError:
            raise problem from None
    return next((each for each in known if is_entry_of(each, adapter)), None)


def is_entry_of(record: AdapterRecord, adapter: AnyAdapter) -> bool:
    """Return whether an entry is of exactly this adapter, given that the weights are the same.

    The same weights act differently under another configuration (alpha, rsLoRA, alpha_pattern).
    """
    return numbers_of(record) == numbers_of(adapter)


def numbers_of(adapter: AnyAdapter | AdapterRecord) -> tuple[object, ...]:
    """Return the numbers that decide how an adapter's weights act."""
    return adapter.kind, adapter.ranks, adapter.alpha, adapter.scaling


def _on_hub(hub_id: str, progress: Progress | None, *, download: bool) -> ResolvedBase:
    from loratool.library.resolving.hub_bases import find_hub_base

    address = HubAddress.parse(hub_id)
    with taken_for_hub_id(hub_id):
        base = find_hub_base(address, f"loratool base add NAME {address} --download")
    if download or base.is_here:
        return ResolvedBase(base.download(progress or Silent(), recheck=False), address.name, None)
    headers = base.headers()
    return ResolvedBase(headers.path, address.name, None, headers)


def _name_of(path: Path) -> str:
    """Return a model's name from its path: that of its folder or file, or in the Hub's cache of its repository."""
    real = path.resolve()
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        return real.parents[1].name.rpartition("--")[2]
    return real.stem if path.is_file() else real.name


def base_at(path: Path, registry: Registry) -> BaseRecord | None:
    """Return the catalogued base whose files are at `path`, if any."""
    real = path.resolve()
    return next((base for base in registry.bases.list() if base.path is not None and base.path.resolve() == real), None)
