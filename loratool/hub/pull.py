"""An adapter out of a repository: which of its files it is, downloaded and checked, and read."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loratool.checkpoint.file_role import PICKLE_SUFFIXES
from loratool.errors import AdapterError, HubError, NotFoundError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_names import CONFIG_NAME, FACTS_NAME, SINGLE_FILE_SUFFIXES, WEIGHTS_NAME
from loratool.formats.facts import check_facts
from loratool.formats.finite import refuse_not_finite
from loratool.formats.read import read_adapter
from loratool.formats.trained_beside import with_trained_beside
from loratool.hub.address import HubAddress, is_hub_id, is_safe
from loratool.hub.download import Watcher, fetch
from loratool.hub.repository import Snapshot, look, remember

LARGEST_JSON: Final = 16 << 20
"""Bytes; no configuration or record of an adapter comes near."""

MODEL_CONFIG: Final = "config.json"


@dataclass(frozen=True, slots=True)
class PulledAdapter:
    """An adapter in the cache, and the snapshot that it is from. `notes` are what a user should know about it."""

    adapter: Adapter
    snapshot: Snapshot
    notes: tuple[str, ...]

    @property
    def base_model(self) -> str | None:
        """The base's Hub id: as its configuration says, else its card; one that is no Hub id where there is no other."""
        named = [name for name in (self.adapter.base_model, *self.snapshot.base_models) if name]
        return next((name for name in named if is_hub_id(name)), named[0] if named else None)


def pull_adapter(address: HubAddress, command: str, *, alpha: float | None = None, fresh: bool = False,
                 snapshot: Snapshot | None = None, watcher: Watcher | None = None) -> PulledAdapter:  # fmt: skip
    """Download the adapter at an address, check it, and read it.

    Args:
        address: of the repository, or of a folder or file inside it.
        command: what the user ran, for errors.
        alpha: for a bare file that does not say its own.
        fresh: never take the cache's word for what the revision is.
        snapshot: of that repository, where it is known already.
        watcher: told how many bytes are done.

    Raises:
        NotFoundError: there is no such repository, revision or file, or none that is an adapter.
        AdapterError: it is a pickle, damaged, or not what it says.
        HubError: it cannot be downloaded, or is not what the Hub says it is.
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
        read = read_adapter(folder / paths[0] if single else (folder / paths[0]).parent, alpha)
        adapter = replace(read, name=address.name)
        refuse_not_finite(adapter)
    if not single:
        adapter = with_trained_beside(adapter, snapshot.names_below(posixpath.dirname(paths[0])))
    listed = snapshot.files[paths[0] if single else paths[1]].sha256
    if listed not in (None, adapter.sha256):
        raise HubError(
            f"the weights of {quoted(address)} changed in the cache while they were read; run '{command}' again"
        )
    check_facts(adapter.facts, f"{address.repo}/{paths[-1]}")
    return PulledAdapter(adapter, snapshot, (*adapter.notes, *_notes(snapshot, paths)))


@contextmanager
def _named_as_on_hub(folder: Path, repo: str) -> Iterator[None]:
    """Give errors of files in the cache with their names on the Hub; a path there says nothing to anybody."""
    try:
        yield
    except AdapterError as error:
        # A long path has been cut off somewhere.
        found = re.compile(rf"'({re.escape(str(folder)[:80])}[^']*)'")
        raise type(error)(found.sub(lambda match: _on_hub(match[1], folder, repo), str(error))) from None


def _on_hub(path: str, folder: Path, repo: str) -> str:
    inside = path.removeprefix(str(folder)) if path.startswith(str(folder)) and not path.endswith("…") else ""
    return quoted(f"{repo}{inside}")


def choose_files(snapshot: Snapshot, inside: str) -> list[str]:
    """The paths of the files that are the adapter in a folder (``""``: the top) or file of a snapshot.

    Of a PEFT folder its configuration, its weights, and what loratool records; else the one safetensors file there is.

    Raises:
        NotFoundError: there is no adapter, or more than one.
        AdapterError: it is a pickle.
    """
    if inside in snapshot.files:
        folder, name = posixpath.split(inside)
        if name not in {CONFIG_NAME, WEIGHTS_NAME} or CONFIG_NAME not in snapshot.names_in(folder):
            return [_single_file(snapshot, inside)]
        inside = folder
    names = snapshot.names_in(inside)
    where = quoted(f"{snapshot.repo}/{inside}" if inside else snapshot.repo)
    if {CONFIG_NAME, WEIGHTS_NAME} <= set(names):
        chosen = [CONFIG_NAME, WEIGHTS_NAME, *([FACTS_NAME] if FACTS_NAME in names else [])]
        return [posixpath.join(inside, name) for name in chosen]
    singles = [name for name in names if Path(name).suffix in SINGLE_FILE_SUFFIXES]
    if MODEL_CONFIG in names and CONFIG_NAME not in names and singles:
        raise NotFoundError(
            f"{where} is a whole model and no adapter; name it as a base with 'loratool base add NAME {snapshot.repo}'"
        )
    if len(singles) == 1:
        return [_single_file(snapshot, posixpath.join(inside, singles[0]))]
    if singles:
        raise NotFoundError(f"{where} holds several adapters ({_listed(singles)}); name one with --path")
    raise _no_adapter(snapshot, inside, names, where)


def _single_file(snapshot: Snapshot, path: str) -> str:
    if Path(path).suffix in PICKLE_SUFFIXES:
        raise _pickle(snapshot, path)
    if Path(path).suffix not in SINGLE_FILE_SUFFIXES:
        raise NotFoundError(
            f"{quoted(path)} of {quoted(snapshot.repo)} is no adapter; name a folder or a .safetensors file"
        )
    return path


def _no_adapter(snapshot: Snapshot, inside: str, names: Sequence[str], where: str) -> AdapterError | NotFoundError:
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if pickles:
        return _pickle(snapshot, posixpath.join(inside, pickles[0]))
    if not names and not any(path.startswith(f"{inside}/") for path in snapshot.files):
        return NotFoundError(f"{where} is not there at commit {snapshot.commit[:12]}; see what is with --path left out")
    prefix = f"{inside}/" if inside else ""
    below = sorted(
        {posixpath.dirname(path) for path in snapshot.files
         if path.startswith(prefix) and posixpath.basename(path) == WEIGHTS_NAME and is_safe(path)}
    )  # fmt: skip
    if below:
        return NotFoundError(f"{where} holds adapters in its folders ({_listed(below)}); name one with --path")
    cached = "; the cache may lack what the Hub has" if snapshot.is_from_cache else ""
    return NotFoundError(
        f"{where} holds no adapter: no {WEIGHTS_NAME} with its {CONFIG_NAME}, no .safetensors file{cached}"
    )


def _pickle(snapshot: Snapshot, path: str) -> AdapterError:
    return AdapterError(
        f"{quoted(path)} of {quoted(snapshot.repo)} is a pickle, which can run code when it is opened, so loratool never "
        f"does; ask for a safetensors file, or where you trust it, load it with peft.PeftModel.from_pretrained, save it "
        "again with save_pretrained and catalogue that with 'loratool add'"
    )


def _refuse_large(snapshot: Snapshot, path: str) -> None:
    size = snapshot.files[path].size or 0
    if path.endswith(".json") and size > LARGEST_JSON:
        raise AdapterError(
            f"{quoted(path)} of {quoted(snapshot.repo)} has {size:,} bytes, which no adapter's has; do not use it"
        )


def _notes(snapshot: Snapshot, paths: Sequence[str]) -> list[str]:
    if snapshot.is_from_cache:
        return ["the Hub was not asked: it is as the cache has it"]
    unknown = [path for path in paths if not snapshot.files[path].is_known]
    return [f"the Hub does not say what {quoted(path)} is, so it was not checked" for path in unknown]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(quoted(name, 60) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
