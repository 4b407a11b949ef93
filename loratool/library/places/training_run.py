"""The folder of an unfinished run, from which it can be resumed: ``runs/<name>`` in the home folder.

If the home cannot be written (a full disk, another user's home), it is ``.<name>.loratool-run`` beside the output.

It holds the request (``run.json``), the last kept state, and the log. It is locked while a process trains in it, and removed
when the adapter is written and catalogued.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from loratool.checkpoint.json_text import read_json_object
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import size_of, staged_file
from loratool.errors import CheckpointError, LoratoolError, OutputError, quoted, to_paste
from loratool.interrupts import note, whole
from loratool.training.checkpoints import TrainingState, load_state, read_recipe, save_state
from registry import home

RUNS: Final = "runs"
LEAST_FREE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    name: str
    path: Path
    out: Path | None = None
    """The output that the folder is beside; None if the folder is in the home."""

    @property
    def log(self) -> Path:
        """Path of the log."""
        return self.path / "log.jsonl"

    @property
    def state(self) -> Path:
        """Path of the last kept state, which may not exist."""
        return self.path / "state.safetensors"

    @property
    def request(self) -> Path:
        """Path of the request, as JSON."""
        return self.path / "run.json"

    def kept_step(self) -> int | None:
        """Return the step of the last state, or None if none was kept."""
        return read_recipe(self.state)[0] if self.state.exists() else None

    def recorded(self) -> dict[str, Any]:
        """Return the request with which the run began.

        Raises:
            LoratoolError: its file is damaged.
        """
        try:
            request = read_json_object(self.request)
        except CheckpointError:
            request = {}
        if not isinstance(request.get("choices"), dict):
            raise LoratoolError(f"{quoted(self.request)} is damaged; remove {quoted(self.path)} and train again")
        return request

    def record(self, request: Mapping[str, Any]) -> None:
        """Write the request.

        Raises:
            OutputError: it cannot be written.
        """
        with staged_file(self.request, OutputKind.OWN_RECORD, force=True) as stage:
            stage.write_text(json.dumps(request, sort_keys=True, indent=2) + "\n")

    def keep(self, state: TrainingState, recipe: Mapping[str, Any]) -> None:
        """Keep a state in place of the previous one.

        Raises:
            OutputError: it cannot be written; the previous one stays.
        """
        before = self.kept_step()
        try:
            save_state(state, recipe, self.state)
        except OutputError as error:
            kept = "no earlier state was kept" if before is None else f"the state of step {before:,} is kept"
            raise OutputError(
                f"{error}; {kept}" + ("" if before is None else f", go on with {self.how_to_go_on}")
            ) from None

    def load(self) -> tuple[TrainingState, dict[str, Any]]:
        """Return the last state and its recipe.

        Raises:
            LoratoolError: there is none.
        """
        return load_state(self.state), read_recipe(self.state)[1]

    @property
    def how_to_go_on(self) -> str:
        """The command to continue the run, in quotes."""
        command = f"loratool train --name {self.name} --resume"
        return f"'{command}'" if self.out is None else to_paste(f"{command} --out PATH", self.out)

    def begin(self, request: Mapping[str, Any]) -> None:
        """Remove what was kept, and write a new request.

        Raises:
            OutputError: it cannot be written.
        """
        for file in (self.state, self.log):
            file.unlink(missing_ok=True)
        self.record(request)

    def remove(self) -> None:
        """Remove the folder. The state is removed first: without it, nothing else can be resumed."""
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def run_folder(name: str, out: Path | None = None) -> RunFolder:
    """Return the folder of the run of that name, which may not exist. `out` is the output of the run."""
    out = out or Path(f"{name}.safetensors")
    in_home = RunFolder(name, home() / RUNS / name)
    beside = RunFolder(name, out.absolute().parent / f".{name}.loratool-run", out)
    if beside.request.exists() or not (in_home.request.exists() or _can_keep(in_home.path, beside.path)):
        return beside
    return in_home


def _can_keep(path: Path, other: Path) -> bool:
    """Return whether a folder can be made at `path`, on a disk that is not full or at least as free as that of `other`."""
    nearest, beside = (next(folder for folder in each.parents if folder.is_dir()) for each in (path, other))
    free = shutil.disk_usage(nearest).free
    has_room = free >= LEAST_FREE_BYTES or free >= shutil.disk_usage(beside).free
    return has_room and os.access(nearest, os.W_OK | os.X_OK)


def abandoned_runs() -> list[Path]:
    """Return the folders in the home of runs that were killed before they kept a state, so that they cannot be resumed."""
    return [run for run in sorted((home() / RUNS).glob("*")) if run.is_dir() and _is_abandoned(run)]


def clear_run(path: Path) -> int:
    """Remove the folder of a killed run, unless another process holds it; return the bytes freed."""
    size = size_of(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except OSError:
        return 0
    finally:
        os.close(fd)
    return size


def _is_abandoned(path: Path) -> bool:
    if RunFolder(path.name, path).state.exists():
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # another process holds it, or the file system has no locks
    finally:
        os.close(fd)
    return True


class Held:
    """Block in which the folder of a run exists and is locked. It is removed at the end if no state was kept.

    Raises:
        OutputError: another process trains in it, or it cannot be created.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._fd = -1

    @whole
    def __enter__(self) -> None:
        path = self._run.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise OutputError(
                f"cannot use {quoted(path)} for the state of the run: {error.strerror}; set LORATOOL_HOME to another place"
            ) from None
        try:
            _lock(self._fd, self._run)
        except BaseException:
            os.close(self._fd)
            raise

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._run.state.exists():
                self._run.remove()
            elif error is not None:
                note(error, f"the state of the run is kept, go on with {self._run.how_to_go_on}")
        finally:
            os.close(self._fd)


def _lock(fd: int, run: RunFolder) -> None:
    """Lock the folder of a run.

    Raises:
        OutputError: another process holds it, or has just removed it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(fd), os.lstat(run.path))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:
        ours = True  # some network file systems have no locks
    if not ours:
        raise OutputError(f"another process is training {quoted(run.name)}; wait for it, or give another --name")
