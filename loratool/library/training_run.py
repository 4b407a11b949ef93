"""The folder of a run that is not finished, from which it can go on: ``runs/<name>`` in the home folder.

Where nothing can be kept in the home, on a full disk or in somebody else's, it is ``.<name>.loratool-run`` beside the output.

It holds what was asked for (``run.json``), the last state that was kept and the log. It is held by a lock while a process
trains in it, and removed when the adapter is written and catalogued.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from loratool.checkpoint.json_text import read_json_object
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import size_of, staged_file
from loratool.errors import CheckpointError, LoratoolError, OutputError, quoted
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
    """The output beside which the folder is; None where it is in the home."""

    @property
    def log(self) -> Path:
        """The log so far."""
        return self.path / "log.jsonl"

    @property
    def state(self) -> Path:
        """The last state that was kept; may not be there."""
        return self.path / "state.safetensors"

    @property
    def request(self) -> Path:
        """What was asked for, as JSON."""
        return self.path / "run.json"

    def kept_step(self) -> int | None:
        """The step of the last state, or None where none was kept."""
        return read_recipe(self.state)[0] if self.state.exists() else None

    def recorded(self) -> dict[str, Any]:
        """What was asked for when the run began.

        Raises:
            LoratoolError: it was damaged.
        """
        try:
            request = read_json_object(self.request)
        except CheckpointError:
            request = {}
        if not isinstance(request.get("choices"), dict):
            raise LoratoolError(f"{quoted(self.request)} is damaged; remove {quoted(self.path)} and train anew")
        return request

    def record(self, request: Mapping[str, Any]) -> None:
        """Keep what was asked for.

        Raises:
            OutputError: it cannot be written.
        """
        with staged_file(self.request, OutputKind.OWN_RECORD, force=True) as stage:
            stage.write_text(json.dumps(request, sort_keys=True, indent=2) + "\n")

    def keep(self, state: TrainingState, recipe: Mapping[str, Any]) -> None:
        """Keep a state in place of the one before it.

        Raises:
            OutputError: it cannot be written; the one before it is there still.
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
        """The last state, and the recipe that it belongs to.

        Raises:
            LoratoolError: there is none.
        """
        return load_state(self.state), read_recipe(self.state)[1]

    @property
    def how_to_go_on(self) -> str:
        """What to type."""
        where = "" if self.out is None else f" --out {shlex.quote(str(self.out))}"
        return f"'loratool train --name {self.name} --resume{where}'"

    def begin(self, request: Mapping[str, Any]) -> None:
        """Forget what was kept, and record what is asked for now.

        Raises:
            OutputError: it cannot be written.
        """
        for file in (self.state, self.log):
            file.unlink(missing_ok=True)
        self.record(request)

    def remove(self) -> None:
        """Remove the folder; its state first, without which the rest is nothing to go on with."""
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


def run_folder(name: str, out: Path | None = None) -> RunFolder:
    """The folder of the run of that name, whether it is there or not; `out` is where its adapter is to be."""
    out = out or Path(f"{name}.safetensors")
    in_home = RunFolder(name, home() / RUNS / name)
    beside = RunFolder(name, out.absolute().parent / f".{name}.loratool-run", out)
    if beside.request.exists() or not (in_home.request.exists() or _can_keep(in_home.path, beside.path)):
        return beside
    return in_home


def _can_keep(path: Path, other: Path) -> bool:
    """Whether a folder can be made at `path`, on a disk that is not full, or no fuller than that of `other`."""
    nearest, beside = (next(folder for folder in each.parents if folder.is_dir()) for each in (path, other))
    free = shutil.disk_usage(nearest).free
    has_room = free >= LEAST_FREE_BYTES or free >= shutil.disk_usage(beside).free
    return has_room and os.access(nearest, os.W_OK | os.X_OK)


def abandoned_runs() -> list[Path]:
    """The folders in the home of runs that were killed before they kept a state, so that nothing can go on from there."""
    return [run for run in sorted((home() / RUNS).glob("*")) if run.is_dir() and _is_abandoned(run)]


def clear_run(path: Path) -> int:
    """Remove the folder of a run that was killed; how many bytes that were. One that another process holds stays."""
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
        return False  # somebody holds it, or there are no locks to tell
    finally:
        os.close(fd)
    return True


class Held:
    """The folder of a run, made and held against other processes while the block runs; one that stays empty goes again.

    Raises:
        OutputError: another process trains in it, or it cannot be made.
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
                f"cannot use {quoted(path)} for what a run keeps: {error.strerror}; set LORATOOL_HOME to another place"
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
    """Raise OutputError if another process holds the folder, or has removed it in between."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(fd), os.lstat(run.path))
    except (BlockingIOError, FileNotFoundError):
        ours = False
    except OSError:
        ours = True  # some network file systems have no locks
    if not ours:
        raise OutputError(f"another process is training {quoted(run.name)}; wait for it, or give another --name")
