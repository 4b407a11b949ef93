"""Adapters from a repository: their files are chosen, downloaded, checked and read."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.checkpoint.file_role import PICKLE_SUFFIXES, FileRole, role_of
from loratool.checkpoint.json_text import LARGEST_LISTING
from loratool.errors import AdapterError, HubError, NotFoundError, quoted
from loratool.formats.adapter_names import (
    BESIDE,
    CONFIG_NAME,
    FACTS_NAME,
    INDEX_NAME,
    NAMES_IN_FOLDERS,
    SINGLE_FILE_SUFFIXES,
    WEIGHT_SUFFIXES,
    WEIGHTS_NAME,
)
from loratool.formats.alpha import Alpha
from loratool.formats.facts import check_facts
from loratool.formats.identify import read_or_identify, refuse_broken_numbers
from loratool.formats.identity import AnyAdapter, Identity
from loratool.formats.trained_beside import with_trained_beside
from loratool.hub.address import HubAddress, is_hub_id, is_safe
from loratool.hub.download import Watcher, fetch
from loratool.hub.repository import Snapshot, look, remember

LARGEST_JSON: Final = 16 << 20
"""Bytes; the configuration and records of an adapter are far smaller."""

MODEL_CONFIG: Final = "config.json"
IN_FOLDERS: Final = tuple(name for name in NAMES_IN_FOLDERS if name != INDEX_NAME)
"""What the weights in an adapter's folder are called; the most usual first."""


@dataclass(frozen=True, slots=True)
class PulledAdapter:
    """An adapter in the cache (its identity, if it is not computed), its snapshot, and `notes` for the user."""

    adapter: AnyAdapter
    snapshot: Snapshot
    notes: tuple[str, ...]

    @property
    def base_model(self) -> str | None:
        """The base named by the adapter's configuration or the repository's card; a Hub id if either has one."""
        named = [name for name in (self.adapter.base_model, *self.snapshot.base_models) if name]
        return next((name for name in named if is_hub_id(name)), named[0] if named else None)


def pull_adapter(address: HubAddress, command: str, *, alpha: Alpha | None = None, fresh: bool = False,
                 snapshot: Snapshot | None = None, watcher: Watcher | None = None) -> PulledAdapter:  # fmt: skip
    """Download the adapter at an address, check it, and read it.

    Args:
        address: the repository, or a folder or file inside it.
        command: the user's command, for error messages.
        alpha: the alpha of a bare file that records none.
        fresh: resolve the revision on the Hub, never from the cache.
        snapshot: the repository's snapshot, if known already.
        watcher: the display of progress.

    Raises:
        NotFoundError: there is no such repository, revision or file, or it holds no adapter.
        AdapterError: the adapter is a pickle, is damaged, or contradicts its own record.
        HubError: a file cannot be downloaded, or differs from what the Hub lists.
    """
    if snapshot is None:
        snapshot = look(address, command, fresh=fresh)
    paths = choose_files(snapshot, address.path or "")
    for path in paths:
        _refuse_large(snapshot, path)
    folder = fetch(snapshot, paths, command, watcher)
    remember(snapshot, address.revision)
    single = len(paths) == 1
    with _named_as_on_hub(folder, address.repo):
        read = read_or_identify(folder / paths[0] if single else (folder / paths[0]).parent, alpha)
        adapter = _called(read, address, folder)
        refuse_broken_numbers(adapter)
    if not single:
        adapter = with_trained_beside(adapter, snapshot.names_below(posixpath.dirname(paths[0])))
    listed = snapshot.files[paths[0] if single else paths[1]].sha256
    if listed not in (None, adapter.sha256):
        raise HubError(f"the weights of {quoted(address)} changed in the cache during the read; run '{command}' again")
    record = next((path for path in paths if posixpath.basename(path) == FACTS_NAME), paths[-1])
    check_facts(adapter.facts, f"{address.repo}/{record}")
    return PulledAdapter(adapter, snapshot, (*adapter.notes, *_notes(snapshot, paths)))


@contextmanager
def _named_as_on_hub(folder: Path, repo: str) -> Iterator[None]:
    """Name files in errors as on the Hub, since their paths in the cache mean nothing to a person."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(_said_of_hub(str(error), folder, repo)) from None


def _called(read: AnyAdapter, address: HubAddress, folder: Path) -> AnyAdapter:
    """An adapter that was read from the cache, called as on the Hub, also where it is said why it is not computed."""
    if isinstance(read, Identity):
        return replace(read, name=address.name, why_not=_said_of_hub(str(read.why_not), folder, address.repo))
    return replace(read, name=address.name)


def _said_of_hub(message: str, folder: Path, repo: str) -> str:
    """A message with the paths of the cache as they are in the repository; it may have cut off a long one."""
    found = re.compile(rf"'({re.escape(str(folder)[:80])}[^']*)'")
    return found.sub(lambda match: _on_hub(match[1], folder, repo), message)


def _on_hub(path: str, folder: Path, repo: str) -> str:
    inside = path.removeprefix(str(folder)) if path.startswith(str(folder)) and not path.endswith("…") else ""
    return quoted(f"{repo}{inside}")


def choose_files(snapshot: Snapshot, inside: str) -> list[str]:
    """Return the paths of an adapter's files. `inside` is a folder of the snapshot (``""`` for the top), or a file.

    They are the configuration, weights, loratool's facts and tokenizer of a PEFT folder, or else the only safetensors file.

    Raises:
        NotFoundError: there is no adapter, or more than one.
        AdapterError: the adapter is a pickle.
    """
    if inside in snapshot.files:
        folder, name = posixpath.split(inside)
        if name not in {CONFIG_NAME, *IN_FOLDERS} or CONFIG_NAME not in snapshot.names_in(folder):
            return [_single_file(snapshot, inside)]
        inside = folder
    names = snapshot.names_in(inside)
    where = quoted(f"{snapshot.repo}/{inside}" if inside else snapshot.repo)
    weights = next((name for name in IN_FOLDERS if name in names), None)
    if CONFIG_NAME in names and weights is not None:
        beside = [name for name in BESIDE if name in names and name != CONFIG_NAME]
        chosen = [CONFIG_NAME, weights, *beside, *_tokenizer(names)]
        return [posixpath.join(inside, name) for name in chosen]
    singles = [name for name in names if Path(name).suffix in SINGLE_FILE_SUFFIXES]
    if MODEL_CONFIG in names and CONFIG_NAME not in names and singles:
        raise NotFoundError(
            f"{where} is a whole model, not an adapter; add it as a base with 'loratool base add NAME {snapshot.repo}'"
        )
    if len(singles) == 1:
        return [_single_file(snapshot, posixpath.join(inside, singles[0]))]
    if singles:
        raise NotFoundError(f"{where} holds several adapters ({_listed(singles)}); name one with --path")
    raise _no_adapter(snapshot, inside, names, where)


def _tokenizer(names: Sequence[str]) -> list[str]:
    """The files of the tokenizer that an adapter was trained with; beside a whole model they are the model's."""
    roles = {name: role_of(name) for name in names}
    if MODEL_CONFIG in names and FileRole.MODEL_WEIGHTS in roles.values():
        return []
    return [name for name, role in roles.items() if role in (FileRole.TOKENIZER, FileRole.CHAT_TEMPLATE)]


def _single_file(snapshot: Snapshot, path: str) -> str:
    if Path(path).suffix in PICKLE_SUFFIXES:
        raise _pickle(snapshot, path)
    if Path(path).suffix not in WEIGHT_SUFFIXES:
        raise NotFoundError(
            f"{quoted(path)} of {quoted(snapshot.repo)} is no adapter; name a folder or a file ending in "
            f"{' or '.join(sorted(WEIGHT_SUFFIXES))}"
        )
    return path


def _no_adapter(snapshot: Snapshot, inside: str, names: Sequence[str], where: str) -> AdapterError | NotFoundError:
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        return _pickle(snapshot, posixpath.join(inside, pickles[0]))
    if not names and not any(path.startswith(f"{inside}/") for path in snapshot.files):
        return NotFoundError(
            f"{where} does not exist at commit {snapshot.commit[:12]}; leave --path out to see what does"
        )
    prefix = f"{inside}/" if inside else ""
    below = sorted(
        {posixpath.dirname(path) for path in snapshot.files
         if path.startswith(prefix) and posixpath.basename(path) in IN_FOLDERS and is_safe(path)}
    )  # fmt: skip
    if below:
        return NotFoundError(f"{where} has adapters in folders ({_listed(below)}); name one with --path")
    cached = "; this is what the cache has, and the Hub may have more" if snapshot.is_from_cache else ""
    return NotFoundError(
        f"{where} holds no adapter: neither {WEIGHTS_NAME} with {CONFIG_NAME} nor a .safetensors file{cached}"
    )


def _pickle(snapshot: Snapshot, path: str) -> AdapterError:
    return AdapterError(
        f"{quoted(path)} of {quoted(snapshot.repo)} is a pickle, which loratool never opens because that can run code; "
        "ask for a safetensors file, or if you trust it, load it with peft.PeftModel.from_pretrained, save it again with "
        "save_pretrained and catalogue that with 'loratool add'"
    )


def _refuse_large(snapshot: Snapshot, path: str) -> None:
    size = snapshot.files[path].size or 0
    largest = LARGEST_LISTING if role_of(path) is FileRole.TOKENIZER else LARGEST_JSON
    if path.endswith(".json") and size > largest:
        raise AdapterError(
            f"{quoted(path)} of {quoted(snapshot.repo)} has {size:,} bytes, far too many for an adapter; do not use it"
        )


def _notes(snapshot: Snapshot, paths: Sequence[str]) -> list[str]:
    if snapshot.is_from_cache:
        return ["the Hub was not asked; this is the copy in the cache"]
    unknown = [path for path in paths if not snapshot.files[path].is_known]
    return [f"the Hub gives no hash for {quoted(path)}, so it was not checked" for path in unknown]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(quoted(name, 60) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
