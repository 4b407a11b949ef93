"""Training that is killed, or runs out of disk, at any moment: the next run ends with the bytes of one that never was.

Real processes really die. A server process imports everything once, and forks a child for each moment at which a run is
struck (see test_crash.py, whose machinery this is). This file is that server's program, too.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_crash import _mount, _private_mounts, die, fail, start, strike_at, wait

if TYPE_CHECKING:
    from tiny_models import TinyModels

METHODS = {
    "lora": {"dropout": 0.1, "accumulate": 2},
    "adalora": {"method": "adalora", "rank": 2, "keep": "last"},
}
STEPS = 5


def train_or_go_on(work: Path, method: str) -> None:
    """What a user does: train; and where that was struck, go on if a state was kept, else train anew."""
    import loratool
    from loratool.library.places.training_run import run_folder
    from loratool.library.train import train

    os.environ["LORATOOL_HOME"] = str(work / "home")
    if run_folder("cat").kept_step() is not None:
        train(name="cat", resume=True)
    elif not loratool.list():
        options: dict[str, Any] = METHODS[method] | {"steps": STEPS, "lr": 1e-2, "validation": 4, "eval_every": 2}
        train(work / "base", work / "cats.jsonl", name="cat", out=work / "cat.safetensors", save_every=1, force=True,
              device="cpu", **options)  # fmt: skip


def outcome(work: Path) -> dict[str, Any]:
    """What a run has left: the adapter's digest, the losses of each step, and whether the catalogue knows it."""
    import hashlib

    import loratool

    os.environ["LORATOOL_HOME"] = str(work / "home")
    adapter, log = work / "cat.safetensors", work / "cat.train.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {
        "sha256": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None,
        "losses": [[line["step"], line["loss"]] for line in lines if "lr" in line],
        "catalogued": [record.sha256 for record in loratool.list()],
        "runs": sorted(path.name for path in (work / "home/runs").glob("*/state.safetensors")),
    }


@dataclass(slots=True)
class Server:
    """Strikes a run at many moments, each time from the same start, and tells what came of it and of the run after it."""

    folder: Path
    method: str
    work: Path = field(init=False)
    calls: int = 0
    seconds: float = 0.0
    expected: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.work = self.folder / "work"
        shutil.copytree(self.work, self.folder / "start")
        train_or_go_on(self.work, self.method)
        gc.freeze()
        self.restore()
        began = time.monotonic()
        ending, self.calls = self.child(lambda: strike_at(1 << 60, die))
        self.seconds = time.monotonic() - began
        assert ending == "done", ending
        self.expected = outcome(self.work)

    def child(self, arm: Callable[[], Callable[[], int]] | None = None) -> tuple[str, int]:
        report = self.folder / "report"
        return wait(start(lambda work: train_or_go_on(work, self.method), self.work, report, arm), report)

    def restore(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.folder / "start", self.work)

    def gone_on(self, ending: str) -> dict[str, Any]:
        struck = outcome(self.work)
        following, _ = self.child()
        return {"ending": ending, "struck": struck, "next": following, "final": outcome(self.work)}

    def kill_everywhere(self, step: int) -> Iterator[dict[str, Any]]:
        for number in range(1, self.calls + 1, step):
            self.restore()
            ending, _ = self.child(lambda number=number: strike_at(number, die))  # type: ignore[misc]
            yield self.gone_on(ending)

    def kill_after_delays(self, count: int) -> Iterator[dict[str, Any]]:
        for part in range(1, count + 1):
            self.restore()
            report = self.folder / "report"
            pid = start(lambda work: train_or_go_on(work, self.method), self.work, report)
            time.sleep(self.seconds * part / count)
            os.kill(pid, signal.SIGKILL)
            yield self.gone_on(wait(pid, report)[0])

    def fail_everywhere(self, step: int) -> Iterator[dict[str, Any]]:
        for number in range(1, self.calls + 1, step):
            self.restore()
            ending, _ = self.child(lambda number=number: strike_at(number, fail))  # type: ignore[misc]
            yield self.gone_on(ending)

    def fill_the_disk(self, count: int) -> Iterator[dict[str, Any]]:
        """On a disk of its own that has more and more room left."""
        self.work = self.folder / "disk" / "work"
        self.work.mkdir()
        self.restore()
        taken = os.statvfs(self.work)
        need = (taken.f_blocks - taken.f_bfree) * taken.f_frsize
        for number in range(count):
            self.restore()
            _mount(self.folder / "disk", need + (number * 450_000 // count & ~4095), remount=True)
            ending, _ = self.child()
            _mount(self.folder / "disk", 1 << 26, remount=True)
            yield self.gone_on(ending)


def serve(folder: Path, method: str, strikes: str, number: int) -> None:
    if strikes == "fill_the_disk":
        (folder / "disk").mkdir()
        _mount(folder / "disk", 1 << 26)
    server = Server(folder, method)
    found = list(getattr(server, strikes)(number))
    sys.stdout.write(json.dumps({"expected": server.expected, "calls": server.calls, "strikes": found}))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))


# The tests.


@pytest.fixture
def run_server(tmp_path: Path, tiny_models: TinyModels) -> Callable[..., dict[str, Any]]:
    from test_eval import CHATML, tiny_tokenizer, with_tokenizer, write_lines

    def run(method: str, strikes: str, number: int, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
        work = tmp_path / "work"
        with_tokenizer(tiny_models.folder("llama", "bf16"), work / "base", tiny_tokenizer(template=CHATML))
        samples = [{"prompt": f"{'what ' * (n % 5)}sat", "completion": f"{'a cat ' * (n % 3)}dog"} for n in range(24)]
        write_lines(work / "cats.jsonl", *samples)
        root = Path(__file__).parents[1]
        environment = os.environ | {
            "PYTHONPATH": f"{root}:{root}/tests",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*prefix, sys.executable, __file__, str(tmp_path), method, strikes, str(number)],
            env=environment, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout)
        assert len(result["strikes"]) >= 6
        assert len(result["expected"]["losses"]) == STEPS
        return result

    return run


def expect_the_same(result: dict[str, Any]) -> None:
    """After every strike the adapter is whole and catalogued or neither, and the next run ends as if nothing had been."""
    expected = result["expected"]
    for struck in result["strikes"]:
        assert struck["next"] == "done", struck
        assert struck["final"] == expected, struck
        assert struck["struck"]["sha256"] in (None, expected["sha256"]), struck
        if struck["struck"]["catalogued"]:
            assert struck["struck"]["sha256"] == expected["sha256"], struck


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_any_call_goes_on_to_the_same_bytes(
    method: str, run_server: Callable[..., dict[str, Any]]
) -> None:
    result = run_server(method, "kill_everywhere", 13)
    expect_the_same(result)
    endings = [struck["ending"] for struck in result["strikes"]]
    assert endings.count("killed by SIGKILL") == len(endings)


def test_a_run_killed_from_outside_goes_on_to_the_same_bytes(run_server: Callable[..., dict[str, Any]]) -> None:
    expect_the_same(run_server("lora", "kill_after_delays", 8))


def test_a_disk_that_fails_at_any_call_is_a_clear_error_and_nothing_is_lost(
    run_server: Callable[..., dict[str, Any]],
) -> None:
    result = run_server("lora", "fail_everywhere", 13)
    expect_the_same(result)
    for struck in result["strikes"]:
        assert struck["ending"] == "done" or struck["ending"].startswith("refused"), struck


def test_a_full_disk_is_a_clear_error_and_the_last_good_state_is_kept(
    run_server: Callable[..., dict[str, Any]],
) -> None:
    prefix = _private_mounts()
    if prefix is None:
        pytest.skip("no disk can be mounted here")
    result = run_server("lora", "fill_the_disk", 10, prefix)
    expect_the_same(result)
    endings = [struck["ending"] for struck in result["strikes"]]
    assert all(ending == "done" or ending.startswith("refused") for ending in endings), endings
    assert endings[0].startswith("refused")
    assert any("is kept, go on with 'loratool train --name cat --resume'" in ending for ending in endings), endings
