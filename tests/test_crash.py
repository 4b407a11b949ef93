"""Killed, out of disk or run twice at once: a model folder is what it was or what it should become, never between.

The runs are real processes that really die. A server process imports everything once and forks a child for each moment
at which a run is to be struck: at its first call of an operating system's function that changes files, at its second, and
so on to its last. This file is that server's program, too.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SHAPES = {"layers.0.first": (70, 24), "layers.0.second": (24, 70), "layers.1.first": (70, 24)}

Tree = dict[str, str]


def tree(folder: Path, hidden: bool = True) -> Tree:
    """Everything below a folder: the content of files, the kind of everything else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not hidden and name.startswith("."):
            continue
        mode = path.lstat().st_mode
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else f"kind {mode >> 12}"
    return found


def loaded(folder: Path) -> Tree:
    """What a program that knows safetensors and not loratool loads from a model: the bytes of its tensors."""
    import torch
    from safetensors.torch import load_file

    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    content = {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return {name: hashlib.sha256(each).hexdigest() for name, each in content.items()}


# The programs that are struck. Each works in a folder that holds base, adapter and other (another adapter).


def merge_to_a_new_folder(work: Path) -> None:
    import loratool

    loratool.merge([work / "adapter"], into=work / "base", out=work / "merged", undo=True)


def merge_stored_otherwise(work: Path) -> None:
    import loratool

    loratool.merge([work / "adapter"], into=work / "base", out=work / "merged", base_as="nf4")


def merge_over_an_old_folder(work: Path) -> None:
    import loratool

    loratool.merge([work / "adapter"], into=work / "base", out=work / "merged", undo=True, force=True)


def merge_in_place(work: Path) -> None:
    import loratool

    loratool.merge([work / "adapter"], into=work / "base", in_place=True)


def unmerge_in_place(work: Path) -> None:
    import loratool

    loratool.unmerge(work / "base", in_place=True)


def unmerge_to_a_new_folder(work: Path) -> None:
    import loratool

    loratool.unmerge(work / "merged", out=work / "restored")


def nothing(work: Path) -> None:
    pass


def merge_the_other(work: Path) -> None:
    import loratool

    loratool.merge([work / "other"], into=work / "base", out=work / "merged", undo=True)


def merge_the_other_in_place(work: Path) -> None:
    import loratool

    loratool.merge([work / "other"], into=work / "base", in_place=True)


def merge_in_place_twice(work: Path) -> None:
    merge_the_other_in_place(work)
    merge_in_place(work)


def look(work: Path) -> None:
    """A command that reads the base and leaves nothing."""
    import loratool
    from loratool.errors import NotFoundError

    loratool.merge([work / "other"], into=work / "base", out=work / "nowhere", dry_run=True, again=True)
    try:
        loratool.verify(work / "base")
    except NotFoundError:
        assert not (work / "base" / "loratool.json").exists()


def finish_merging(work: Path) -> None:
    import loratool

    if not (work / "merged").exists():
        merge_to_a_new_folder(work)
    loratool.verify(work / "merged")


def finish_merging_stored_otherwise(work: Path) -> None:
    import loratool

    if not (work / "merged").exists():
        merge_stored_otherwise(work)
    loratool.verify(work / "merged")


def finish_unmerging(work: Path) -> None:
    if not (work / "restored").exists():
        unmerge_to_a_new_folder(work)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run, what was done before it, and the next run of loratool after it was struck."""

    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    after: Callable[[Path], None]
    finishes: bool
    """Whether the next run brings it to its end; else it may also lie as it lay before."""


SCENARIOS = {
    "merge to a new folder": Scenario(nothing, merge_to_a_new_folder, finish_merging, True),
    "merge over an old folder": Scenario(merge_the_other, merge_over_an_old_folder, merge_over_an_old_folder, True),
    "merge stored otherwise": Scenario(nothing, merge_stored_otherwise, finish_merging_stored_otherwise, True),
    "merge in place": Scenario(nothing, merge_in_place, look, False),
    "merge in place on a merge": Scenario(merge_the_other_in_place, merge_in_place, look, False),
    "unmerge in place": Scenario(merge_in_place, unmerge_in_place, look, False),
    "unmerge in place to a merge": Scenario(merge_in_place_twice, unmerge_in_place, look, False),
    "unmerge to a new folder": Scenario(merge_to_a_new_folder, unmerge_to_a_new_folder, finish_unmerging, True),
    "unmerge to the base": Scenario(merge_stored_otherwise, unmerge_to_a_new_folder, finish_unmerging, True),
}
IN_PLACE = [name for name in SCENARIOS if "in place" in name]


# The server.

STRUCK = {
    os: ["pwrite", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "link", "truncate", "fchmod",
         "copy_file_range", "posix_fallocate", "open"],
    fcntl: ["ioctl", "flock"],
    builtins: ["open"],
    io: ["open"],
}  # fmt: skip
"""The functions whose calls are counted; the opening of a file counts where it makes or changes one."""

SPENDING = {"pwrite", "copy_file_range", "posix_fallocate", "mkdir", "open", "fsync"}
"""Those that fail on a full disk."""


def strike_at(number: int, strike: Callable[[str, Callable[..., Any], tuple[Any, ...]], None]) -> Callable[[], int]:
    """Call `strike` instead of the call of this number, before it; returns a function that tells the count so far."""
    count = 0

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if name != "open" or _writes(arguments, options):
                count += 1
                if count >= number:
                    strike(name, call, arguments)
            return call(*arguments, **options)

        return struck

    for module, names in STRUCK.items():
        for name in names:
            setattr(module, name, wrap(name, getattr(module, name)))
    from loratool.checkpoint import staging

    staging._exchange = wrap("exchange", staging._exchange)
    return lambda: count


def _writes(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
    return bool(mode & (os.O_CREAT | os.O_TRUNC)) if isinstance(mode, int) else any(letter in mode for letter in "wxa")


def die(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """End at once, half of a write done."""
    if name == "pwrite":
        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], arguments[2])
    if name == "copy_file_range":
        call(arguments[0], arguments[1], arguments[2] // 2, *arguments[3:])
    os.kill(os.getpid(), signal.SIGKILL)


def stop(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], stopped: list[bool] = []) -> None:  # noqa: B006
    """Stand still until somebody says to go on; once."""
    if not stopped:
        stopped.append(True)
        os.kill(os.getpid(), signal.SIGSTOP)


def fail(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Fail as on a full disk, and from then on always."""
    if name in SPENDING:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_once(name: str, call: Callable[..., Any], arguments: tuple[Any, ...], failed: list[bool] = []) -> None:  # noqa: B006
    """Fail as a broken disk does, once."""
    if name in SPENDING and not failed:
        failed.append(True)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def start(
    run: Callable[[Path], None], work: Path, report: Path, arm: Callable[[], Callable[[], int]] | None = None
) -> int:
    """Run in a child that ends without any cleaning; its `report` says how. Returns its process id."""
    _wait_to_be_alone()
    pid = os.fork()
    if pid:
        return pid
    from loratool.errors import LoratoolError
    from registry import RegistryError

    told = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counted = arm() if arm else lambda: 0
    try:
        run(work)
        ending = "done"
    except (LoratoolError, RegistryError) as error:
        ending = f"refused: {error}"
    except BaseException:
        ending = f"crashed: {traceback.format_exc()}"
    os.write(told, json.dumps([ending, counted()]).encode())
    os._exit(0)


def _wait_to_be_alone() -> None:
    """Let threads that Python has joined come to their end in the kernel, too.

    An ending thread gives its memory back to MKL under a lock of MKL's; a child forked meanwhile finds it locked for ever.
    """
    deadline = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline, f"threads stay: {threading.enumerate()}"
        os.sched_yield()


def wait(pid: int, report: Path) -> tuple[str, int]:
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}", 0
    ending, count = json.loads(report.read_text())
    return ending, count


class Server:
    """Strikes a scenario's run at every moment, each time from the same start, and tells what came of it."""

    def __init__(self, scenario: Scenario, folder: Path, step: int) -> None:
        self.scenario, self.step = scenario, step
        self.folder, self.work, self.kept = folder, folder / "work", folder / "start"
        self.report = folder / "report"
        self._must(scenario.prepare)
        shutil.copytree(self.work, self.kept, symlinks=True)
        self.before = tree(self.work)
        # What is imported and compiled on the first use is inherited by every child.
        scenario.run(self.work)
        scenario.after(self.work)
        gc.freeze()
        self.restore()
        began = time.monotonic()
        self.calls = self._must(scenario.run, lambda: strike_at(1 << 60, die))
        self.seconds = time.monotonic() - began
        self.after = tree(self.work)
        assert self.before != self.after
        self.loaded = {"after": loaded(self.work / "base")}
        self.restore()
        self.loaded["before"] = loaded(self.work / "base")

    def _must(self, run: Callable[[Path], None], arm: Callable[[], Callable[[], int]] | None = None) -> int:
        ending, count = self.child(run, arm)
        assert ending == "done", ending
        return count

    def child(self, run: Callable[[Path], None], arm: Callable[[], Callable[[], int]] | None = None) -> tuple[str, int]:
        return wait(start(run, self.work, self.report, arm), self.report)

    def restore(self, kept: Path | None = None) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(kept or self.kept, self.work, symlinks=True)

    def state(self, hidden: bool = True) -> str:
        """``before``, ``after``, or what is different from both."""
        now = tree(self.work, hidden)
        for name, known in (("before", self.before), ("after", self.after)):
            if now == known:
                return name
        known = (
            self.before
            if len(self.before.items() ^ now.items()) < len(self.after.items() ^ now.items())
            else self.after
        )
        return f"between: {sorted({name for name, _ in known.items() ^ now.items()})}"

    def load(self) -> str:
        """What another program finds in the base: ``before``, ``after``, a ``mixture``, or nothing that it could load."""
        try:
            found = loaded(self.work / "base")
        except Exception:
            return "refused"
        return next((name for name, known in self.loaded.items() if found == known), "mixture")

    def strike(self, arm: Callable[[], Callable[[], int]]) -> dict[str, Any]:
        """Strike a run; how it ended, the state that it left, and that after the next run."""
        self.restore()
        ending, _ = self.child(self.scenario.run, arm)
        return {
            "ending": ending,
            "state": self.state(),
            "visible": self.state(hidden=False),
            "loaded": self.load(),
        } | self.go_on()

    def go_on(self) -> dict[str, Any]:
        try:
            self.scenario.after(self.work)
            following = "done"
        except Exception:
            following = traceback.format_exc()
        return {"next": following, "final": self.state()}

    def moments(self) -> range:
        """The numbers of the calls to strike at; the last ones always, where a change is carried out."""
        return range((self.calls - 1) % self.step + 1, self.calls + 1, self.step)

    def kill_everywhere(self) -> Iterator[dict[str, Any]]:
        for number in self.moments():
            yield {"at": number} | self.strike(lambda number=number: strike_at(number, die))  # type: ignore[misc]

    def kill_after_delays(self) -> Iterator[dict[str, Any]]:
        """Killed from outside, wherever the run happens to be."""
        for tenth in range(1, 11):
            self.restore()
            pid = start(self.scenario.run, self.work, self.report)
            time.sleep(self.seconds * tenth / 9)
            os.kill(pid, signal.SIGKILL)
            ending, _ = wait(pid, self.report)
            yield {
                "at": tenth,
                "ending": ending,
                "state": self.state(),
                "visible": self.state(hidden=False),
                "loaded": self.load(),
            } | self.go_on()

    def kill_the_recovery(self) -> Iterator[dict[str, Any]]:
        """Killed after its commit, the change is finished by the next run, which is killed at every moment, too."""
        committed = self.folder / "committed"
        for number in range(1, self.calls + 1):
            self.restore()
            self.child(self.scenario.run, lambda number=number: strike_at(number, die))  # type: ignore[misc]
            if (self.work / "base/.loratool-journal/commit.json").exists():
                break
        shutil.copytree(self.work, committed, symlinks=True)
        calls = self._must(look, lambda: strike_at(1 << 60, die))
        for number in range(1, calls + 1, self.step):
            self.restore(committed)
            ending, _ = self.child(look, lambda number=number: strike_at(number, die))  # type: ignore[misc]
            yield {"at": number, "ending": ending, "state": "", "visible": "", "loaded": self.load()} | self.go_on()

    def fail_everywhere(self, how: Callable[..., None]) -> Iterator[dict[str, Any]]:
        for number in self.moments():
            yield {"at": number} | self.strike(lambda number=number: strike_at(number, how))  # type: ignore[misc]

    def limit_file_sizes(self) -> Iterator[dict[str, Any]]:
        largest = max(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        database = max(path.stat().st_size for path in Path(os.environ["LORATOOL_HOME"]).glob("registry.db*"))
        for size in [0, 1, 500, 3_000, largest // 3, largest - 1, database + (1 << 16)]:

            def arm(size: int = size) -> Callable[[], int]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
                return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY)) or 0

            yield {"at": size} | self.strike(arm)

    def fill_the_disk(self) -> Iterator[dict[str, Any]]:
        """On a disk of its own that has less and less room left."""
        self.work = self.folder / "disk" / "work"
        self.work.mkdir()
        self.restore()
        taken = os.statvfs(self.work)
        need = (taken.f_blocks - taken.f_bfree) * taken.f_frsize
        for spare in [0, *range(4, 200, 12)]:
            self.restore()
            self.before = tree(self.work)
            _mount(self.folder / "disk", need + (spare << 10), remount=True)
            ending, _ = self.child(self.scenario.run)
            state = self.state()
            _mount(self.folder / "disk", 1 << 26, remount=True)
            if ending != "done":
                self._must(self.scenario.run)
            after = tree(self.work)
            self._must(self.scenario.after)
            whole = after == tree(self.work) and (ending != "done" or state != "before")
            yield {"at": spare, "ending": ending, "state": state, "final": "after" if whole else "not whole"}

    def two_at_once(self, second: Callable[[Path], None]) -> Iterator[dict[str, Any]]:
        """While one run stands still, another begins; then the first goes on."""
        for number in self.moments():
            self.restore()
            first_report = self.folder / "first"
            pid = start(self.scenario.run, self.work, first_report, lambda number=number: strike_at(number, stop))  # type: ignore[misc]
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                continue
            other, _ = self.child(second)
            os.kill(pid, signal.SIGCONT)
            first, _ = wait(pid, first_report)
            yield {"at": number, "first": first, "second": other, "final": self.state(), "tree": tree(self.work)}


def _mount(folder: Path, size: int, *, remount: bool = False) -> None:
    options = f"{'remount,' if remount else ''}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def serve(name: str, folder: Path, strikes: str, step: int) -> None:
    import torch  # noqa: F401

    import loratool.library.bases
    import loratool.library.merge
    import loratool.library.unmerge  # noqa: F401

    if strikes == "fill_the_disk":
        (folder / "disk").mkdir()
        _mount(folder / "disk", 1 << 26)
    server = Server(SCENARIOS[name], folder, step)
    found: Any
    if strikes.startswith("two_at_once"):
        found = server.two_at_once(globals()[strikes.partition(" ")[2]])
    elif strikes.startswith("fail_everywhere"):
        found = server.fail_everywhere(globals()[strikes.partition(" ")[2]])
    else:
        found = getattr(server, strikes)()
    sys.stdout.write(json.dumps({"before": server.before, "after": server.after, "strikes": list(found)}))


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))


# The tests.


@pytest.fixture
def run_server(tmp_path: Path, home_of_its_own: Path) -> Callable[..., dict[str, Any]]:
    """Run the server on a scenario; returns the trees before and after it and what came of each strike."""

    def run(name: str, strikes: str, *, step: int = 1, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
        _make_base(tmp_path / "work")
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            [*prefix, sys.executable, __file__, name, str(tmp_path), strikes, str(step)],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout)
        assert len(result["strikes"]) > 5, result
        return result

    return run


def _make_base(work: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from tiny_adapters import save_plain_adapter

    base = work / "base"
    base.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    tensors["norm.weight"] = torch.randn(24, generator=generator).bfloat16()
    shards = {"one.safetensors": sorted(tensors)[:2], "two.safetensors": sorted(tensors)[2:]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, base / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "llama"}\n')
    save_plain_adapter(work / "adapter", SHAPES, r=3)
    save_plain_adapter(work / "other", {name: SHAPES[name] for name in list(SHAPES)[1:]}, r=2, seed=5)


def expect_whole(result: dict[str, Any], scenario: Scenario) -> None:
    """After every strike and the next run, everything is as it was or as it should become, and nothing is left over."""
    wrong = []
    for struck in result["strikes"]:
        allowed = {"after"} if scenario.finishes else {"before", "after"}
        if struck["next"] != "done" or struck["final"] not in allowed or struck["ending"].startswith("crashed"):
            wrong.append(struck)
    assert not wrong, json.dumps(wrong[:3], indent=1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_killed_at_any_call_loses_nothing(name: str, run_server: Callable[..., dict[str, Any]]) -> None:
    result = run_server(name, "kill_everywhere", step=1 if name in IN_PLACE else 3)
    expect_whole(result, SCENARIOS[name])
    endings = [struck["ending"] for struck in result["strikes"]]
    assert endings.count("killed by SIGKILL") > 0.8 * len(endings)
    if name not in IN_PLACE:
        assert {struck["visible"] for struck in result["strikes"]} <= {"before", "after"}
    finals = [struck["final"] for struck in result["strikes"]]
    if name in IN_PLACE:
        assert {"before", "after"} == set(finals), "the strikes fell on one side of the commit only"
        assert {struck["loaded"] for struck in result["strikes"]} == {"before", "refused", "after"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_killed_from_outside_loses_nothing(name: str, run_server: Callable[..., dict[str, Any]]) -> None:
    expect_whole(run_server(name, "kill_after_delays"), SCENARIOS[name])


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_recovery_killed_at_any_call_is_finished_by_the_next(
    name: str, run_server: Callable[..., dict[str, Any]]
) -> None:
    result = run_server(name, "kill_the_recovery", step=2)
    wrong = [struck for struck in result["strikes"] if (struck["next"], struck["final"]) != ("done", "after")]
    assert not wrong, json.dumps(wrong[:3], indent=1)
    assert "mixture" not in {struck["loaded"] for struck in result["strikes"]}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "fail") for name in SCENARIOS),
        *((name, "fail_once") for name in ("merge over an old folder", *IN_PLACE[:3])),
    ],
)
def test_a_disk_that_fails_at_any_call_is_a_clear_error_and_loses_nothing(
    name: str, how: str, run_server: Callable[..., dict[str, Any]]
) -> None:
    result = run_server(name, f"fail_everywhere {how}", step=4)
    expect_whole(result, SCENARIOS[name])
    for struck in result["strikes"]:
        if struck["ending"].startswith("refused") and "could not be finished" not in struck["ending"]:
            assert struck["state"] in {"before", "after"}, struck
    assert sum(struck["ending"].startswith("refused") for struck in result["strikes"]) > 1


@pytest.mark.parametrize("name", ["merge to a new folder", "merge in place", "unmerge in place"])
def test_a_limit_on_the_size_of_files_is_a_clear_error_and_loses_nothing(
    name: str, run_server: Callable[..., dict[str, Any]]
) -> None:
    result = run_server(name, "limit_file_sizes")
    expect_whole(result, SCENARIOS[name])
    assert result["strikes"][0]["ending"].startswith("refused")
    assert result["strikes"][-1]["ending"] == "done"


def _private_mounts() -> tuple[str, ...] | None:
    """A command under which a disk can be mounted that goes away with it, or None."""
    for prefix in (("unshare", "--mount"), ("unshare", "--mount", "--map-root-user")):
        try:
            if subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0:
                return prefix
        except OSError:
            return None
    return None


@pytest.mark.parametrize("name", ["merge to a new folder", "merge in place", "unmerge in place"])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(name: str, run_server: Callable[..., dict[str, Any]]) -> None:
    prefix = _private_mounts()
    if prefix is None:
        pytest.skip("no disk can be mounted here")
    result = run_server(name, "fill_the_disk", prefix=prefix)
    for struck in result["strikes"]:
        assert struck["ending"] == "done" or struck["ending"].startswith("refused"), struck
        assert struck["ending"] == "done" or struck["state"] == "before", struck
        assert struck["final"] == "after", struck
    endings = [struck["ending"] for struck in result["strikes"]]
    assert endings[0].startswith("refused")
    assert endings[-1] == "done"
    assert any("free" in ending for ending in endings)


def test_two_runs_at_once_for_one_output_give_one_whole_output(run_server: Callable[..., dict[str, Any]]) -> None:
    result = run_server("merge to a new folder", "two_at_once merge_to_a_new_folder", step=4)
    for struck in result["strikes"]:
        endings = sorted([struck["first"], struck["second"]])
        assert endings[0] == "done", struck
        assert endings[1].startswith("refused"), struck
        assert struck["final"] == "after", struck
    assert any("another run" in struck["second"] for struck in result["strikes"])


def test_two_runs_at_once_over_one_old_output_leave_a_whole_one(run_server: Callable[..., dict[str, Any]]) -> None:
    result = run_server("merge over an old folder", "two_at_once merge_over_an_old_folder", step=3)
    for struck in result["strikes"]:
        assert "done" in {struck["first"], struck["second"]}, struck
        assert not any(struck[run].startswith("crashed") for run in ("first", "second")), struck
        assert struck["final"] == "after", struck


def test_two_runs_at_once_in_one_folder_are_told_apart(run_server: Callable[..., dict[str, Any]]) -> None:
    """The second is refused, or comes wholly before or after the first."""
    result = run_server("merge in place", "two_at_once merge_in_place", step=4)
    for struck in result["strikes"]:
        assert struck["first"] == "done" or struck["second"] == "done", struck
        assert not any(struck[run].startswith("crashed") for run in ("first", "second")), struck
        merges = [name for name in struck["tree"] if name.endswith("/undo.st")]
        assert len(merges) == [struck["first"], struck["second"]].count("done"), struck
        assert not [name for name in struck["tree"] if "/." in name], struck
    assert any("another run" in struck["second"] for struck in result["strikes"])


def test_a_model_is_never_read_while_it_changes(run_server: Callable[..., dict[str, Any]]) -> None:
    """A merge that begins while its base changes in place is refused, or made from the base before or after."""
    result = run_server("merge in place", "two_at_once merge_the_other", step=4)
    outputs = set()
    for struck in result["strikes"]:
        assert struck["first"] == "done" or "another run" in struck["first"], struck
        assert struck["second"] == "done" or "another run" in struck["second"], struck
        shards = [
            value for name, value in struck["tree"].items() if name.startswith("merged/") and "safetensors" in name
        ]
        outputs.add(tuple(shards))
    assert any("another run" in struck["second"] for struck in result["strikes"])
    assert len(outputs - {()}) <= 2, "some output was made from neither the base before nor after"


def test_a_model_is_never_changed_while_it_is_read(run_server: Callable[..., dict[str, Any]]) -> None:
    """A change in place that begins while a merge reads its base is refused, or comes wholly before or after."""
    result = run_server("merge to a new folder", "two_at_once merge_the_other_in_place", step=4)
    for struck in result["strikes"]:
        assert struck["first"] == "done", struck
        assert struck["second"] == "done" or "another run" in struck["second"], struck
    outputs = {
        tuple(value for name, value in struck["tree"].items() if name.startswith("merged/") and "safetensors" in name)
        for struck in result["strikes"]
    }
    assert any("another run" in struck["second"] for struck in result["strikes"])
    assert len(outputs) <= 2, "some output was made from neither the base before nor after"


def test_a_journal_that_was_not_committed_is_forgotten(tmp_path: Path) -> None:
    import loratool

    _make_base(tmp_path)
    before = tree(tmp_path / "base")
    journal = tmp_path / "base" / ".loratool-journal"
    (journal / "new").mkdir(parents=True)
    (journal / "redo").write_bytes(bytes(100))
    (journal / "commit.json.partial").write_text('{"ranges": [')
    loratool.base_add("base", tmp_path / "base")
    assert tree(tmp_path / "base") == before


def test_what_a_killed_run_left_under_another_lock_is_taken_over(tmp_path: Path) -> None:
    import loratool

    _make_base(tmp_path)
    stage = tmp_path / ".merged.loratool-partial"
    (stage / "deep" / "er").mkdir(parents=True)
    (stage / "one.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    (stage / "link").symlink_to(tmp_path / "adapter")
    adapter = tree(tmp_path / "adapter")
    merged = loratool.merge([tmp_path / "adapter"], into=tmp_path / "base", out=tmp_path / "merged").out
    loratool.verify(merged)
    assert tree(tmp_path / "adapter") == adapter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "other"]
