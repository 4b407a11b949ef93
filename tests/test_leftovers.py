"""What killed runs left is found wherever it lies and freed, never a living run's; and the catalogue comes to know what they did.

The runs are processes that really die: forks of one that has imported everything (test_crash, whose machinery this is).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_crash import _make_base, die, start, strike_at, tree, wait

import loratool
from loratool.checkpoint import unfinished
from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import staged_file, staged_folder
from loratool.checkpoint.unfinished import Note, noting_in, taken_over
from loratool.errors import LoratoolError
from registry import Registry

KIND = OutputKind.MERGED_MODEL


@pytest.fixture
def work(tmp_path: Path) -> Path:
    _make_base(tmp_path)
    return tmp_path


def killed(home: Path, begin: Callable[[], Any]) -> int:
    """Run `begin` in a child that notes in the home and dies in it; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            with noting_in(home / "running"):
                begin()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    return pid


def die_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_a_folder(out: Path) -> None:
    with staged_folder(out, KIND) as stage:
        (stage / "model.safetensors").write_bytes(bytes(1000))
        die_now()


def write_a_file(out: Path) -> None:
    with staged_file(out, KIND) as stage:
        stage.write_bytes(bytes(1000))
        die_now()


def findings() -> list[str]:
    return [finding.message for finding in loratool.doctor().findings if finding.kind == "leftover"]


# What is left of outputs.


@pytest.mark.parametrize("write", [write_a_folder, write_a_file])
def test_a_partial_output_of_a_killed_run_is_found_wherever_it_lies_and_freed(
    write: Callable[[Path], None], home_of_its_own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "far" / "away" / "out"
    pid = killed(home_of_its_own, lambda: write(out))
    (message,) = findings()
    assert f"process {pid}" in message and f"'{out}'" in message and "loratool doctor --gc" in message
    done = loratool.doctor(gc=True)
    assert done.findings == () and done.freed is not None
    assert (done.freed.entries, done.freed.size_bytes) == (1, 1000)
    assert list(out.parent.iterdir()) == [] and list((home_of_its_own / "running").iterdir()) == []


def test_what_a_living_run_writes_is_neither_named_nor_freed(home_of_its_own: Path, tmp_path: Path) -> None:
    with noting_in(home_of_its_own / "running"), staged_folder(tmp_path / "out", KIND) as stage:
        (stage / "file").write_text("half")
        here = tree(tmp_path)
        assert loratool.doctor(gc=True).findings == ()
        assert tree(tmp_path) == here
    assert (tmp_path / "out" / "file").exists() and list((home_of_its_own / "running").iterdir()) == []


def test_a_note_is_of_the_run_that_holds_it_even_if_another_has_its_number(
    home_of_its_own: Path, tmp_path: Path
) -> None:
    """Where the file system has no locks, a process is told by its number and when it began."""
    pid = killed(home_of_its_own, lambda: write_a_folder(tmp_path / "out"))
    (note,) = (home_of_its_own / "running").iterdir()
    facts = json.loads(note.read_text())
    assert facts["process"]["pid"] == pid

    def no_locks(*arguments: Any) -> None:
        raise OSError("no locks here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished.fcntl, "flock", no_locks)
        for changes, dead in (
            ({}, True),
            ({"pid": os.getpid()}, True),  # the number is another's by now
            ({"pid": os.getpid(), "began": unfinished._began(os.getpid())}, False),
            ({"machine": "elsewhere", "boot": "other"}, False),
            ({"boot": "before"}, True),
            ({"space": "pid:[1]"}, False),
        ):
            note.write_text(json.dumps(facts | {"process": facts["process"] | changes}))
            with taken_over(home_of_its_own / "running") as notes:
                assert bool(notes) == dead, changes


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"process": 7}', '{"process": {"pid": "x"}}', '{"what": "output"}',
                                     "[" * 100_000])  # fmt: skip
def test_a_note_that_no_run_wrote_is_left_alone(content: str, home_of_its_own: Path) -> None:
    (home_of_its_own / "running").mkdir()
    note = home_of_its_own / "running" / "x.json"
    note.write_text(content)
    assert loratool.doctor(gc=True).findings == ()
    assert note.exists()


def test_a_note_makes_doctor_remove_nothing_but_partial_outputs(home_of_its_own: Path, tmp_path: Path) -> None:
    for name in ("mine", "linked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("mine")
    (tmp_path / ".link.loratool-partial").symlink_to(tmp_path / "linked")
    killed(home_of_its_own, lambda: Note({"what": "output", "out": str(tmp_path / "mine")}).__enter__() and die_now())
    killed(home_of_its_own, lambda: Note({"what": "output", "out": str(tmp_path / "link")}).__enter__() and die_now())
    killed(
        home_of_its_own, lambda: Note({"what": "change", "folder": str(tmp_path / "mine")}).__enter__() and die_now()
    )
    before = tree(tmp_path)
    loratool.doctor(gc=True)
    assert tree(tmp_path) == before


def test_a_home_that_cannot_be_written_is_no_reason_not_to_run(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file in its place")
    with noting_in(tmp_path / "home" / "running"), staged_file(tmp_path / "out", KIND) as stage:
        stage.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"


def test_the_next_run_for_the_same_output_takes_its_part_over(home_of_its_own: Path, work: Path) -> None:
    killed(home_of_its_own, lambda: write_a_folder(work / "merged"))
    loratool.verify(loratool.merge([work / "adapter"], into=work / "base", out=work / "merged").out)
    assert findings() == []
    assert list((home_of_its_own / "running").iterdir()) == []


def test_a_run_that_was_killed_before_it_kept_a_state_leaves_nothing_for_long(home_of_its_own: Path) -> None:
    runs = home_of_its_own / "runs"
    for name in ("nothing", "state", "living"):
        (runs / name).mkdir(parents=True)
        (runs / name / "run.json").write_text("{}")
    (runs / "state" / "state.safetensors").write_bytes(b"kept")
    living = os.open(runs / "living", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    (message,) = findings()
    assert "'" + str(runs / "nothing") + "'" in message
    loratool.doctor(gc=True)
    assert sorted(path.name for path in runs.iterdir()) == ["living", "state"]
    os.close(living)


def test_scratch_in_the_home_is_freed_when_it_is_old(home_of_its_own: Path) -> None:
    for folder, name in (("digests", "a.1.tmp"), ("digests", "b.1.tmp"), ("running", "c.draft")):
        (home_of_its_own / folder).mkdir(exist_ok=True)
        (home_of_its_own / folder / name).write_text("half")
    for old in ("digests/a.1.tmp", "running/c.draft"):
        os.utime(home_of_its_own / old, (1, 1))
    assert len(findings()) == 2
    loratool.doctor(gc=True)
    assert findings() == [] and (home_of_its_own / "digests" / "b.1.tmp").exists()


# What the catalogue is still to be told. This file is the program of a server that strikes commands.


def merge(work: Path) -> None:
    loratool.merge([work / "adapter"], into=work / "base", out=work / "merged", undo=True)


def merge_over(work: Path) -> None:
    loratool.merge([work / "adapter"], into=work / "base", out=work / "merged", force=True)


def merge_in_place(work: Path) -> None:
    loratool.merge([work / "adapter"], into=work / "base", in_place=True)


def unmerge_in_place(work: Path) -> None:
    loratool.unmerge(work / "base", in_place=True)


def quantize(work: Path) -> None:
    loratool.quantize(work / "base", out=work / "nf4", name="quantized")


def merge_the_other(work: Path) -> None:
    loratool.merge([work / "other"], into=work / "base", out=work / "merged")


def catalogue_the_base(work: Path) -> None:
    loratool.base_add("base", work / "base")


COMMANDS: dict[str, tuple[list[Callable[[Path], None]], Callable[[Path], None]]] = {
    "merge": ([catalogue_the_base], merge),
    "merge over": ([merge_the_other], merge_over),
    "merge in place": ([], merge_in_place),
    "unmerge in place": ([merge_in_place], unmerge_in_place),
    "quantize": ([catalogue_the_base], quantize),
}
"""What was done before a command that is killed, and the command."""


def rows(home: Path) -> list[Any]:
    """What the catalogue says of merges and bases, but for when and how long."""
    with Registry.open(home, read_only=True) as catalogue:
        merges = [
            [str(each.output), each.state, each.in_place, each.base, each.base_fingerprint, each.output_fingerprint,
             str(each.undo_file), [[one.adapter, one.sha256, one.weight] for one in each.adapters]]
            for each in catalogue.merges.list()
        ]  # fmt: skip
        bases = [[each.name, each.fingerprint, each.variant_of, each.dtype] for each in catalogue.bases.list()]
    return [merges, bases]


def serve(name: str, folder: Path) -> None:
    """Kill a command at each call that changes a file, and let other commands look at the catalogue afterwards."""
    before, command = COMMANDS[name]
    work, home, report = folder / "work", folder / "home", folder / "report"
    for each in before:
        each(work)
    for kept in (work, home):
        shutil.copytree(kept, folder / f"kept-{kept.name}")

    def restore() -> None:
        for kept in (work, home):
            shutil.rmtree(kept)
            shutil.copytree(folder / f"kept-{kept.name}", kept)

    def strike(number: int) -> tuple[str, int]:
        restore()
        return wait(start(command, work, report, lambda: strike_at(number, die)), report)

    restore()
    known = {"before": [tree(work), rows(home)]}
    command(work)  # what is imported on the first use is inherited by every child
    ending, calls = strike(1 << 60)
    assert ending == "done", ending
    known["after"] = [tree(work), rows(home)]
    found = []
    for number in sorted({*range(1, calls, calls // 8), *range(calls - 30, calls + 1, 2)}):  # the end is what matters
        strike(number)
        loratool.doctor()
        visible, known_now = tree(work, hidden=False), rows(home)
        loratool.doctor(gc=True)
        left = [*work.rglob("*.loratool-*"), *(home / "running").glob("*.json"), *(home / "store" / "tmp").glob("*")]
        found.append([number, visible, known_now, [str(path) for path in left]])
    sys.stdout.write(json.dumps(known | {"strikes": found}))


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_catalogue_is_right_wherever_a_command_is_killed(name: str, tmp_path: Path, home_of_its_own: Path) -> None:
    """The next command enters what the killed one did not come to enter, and nothing that is not there."""
    _make_base(tmp_path / "work")
    (tmp_path / "home").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LORATOOL_HOME": str(tmp_path / "home")}
    command = [sys.executable, __file__, name, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["before"][1] != result["after"][1]
    seen = set()
    for number, visible, found, left in result["strikes"]:
        state = "after" if visible == result["after"][0] else "before"
        seen.add(state)
        assert visible == result[state][0], (number, state)
        assert found == result[state][1], (number, state)
        assert left == [], (number, state)
    assert seen == {"before", "after"}


def test_a_merge_that_the_catalogue_could_not_be_told_of_is_entered_by_the_next_command(
    work: Path, home_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry import RegistryFullError
    from registry.merges import Merges

    def full(*arguments: Any, **options: Any) -> None:
        raise RegistryFullError("the disk is full")

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            monkeypatch.setattr(Merges, "record", full)
            status = not any(
                "the disk is full" in each for each in loratool.merge(work / "adapter", work / "base").notes
            )
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(rows(home_of_its_own)[0]) == 0
    loratool.doctor()
    assert len(rows(home_of_its_own)[0]) == 1


def test_a_promise_of_somebody_elses_output_is_not_kept(work: Path, home_of_its_own: Path) -> None:
    """Killed before its output came; meanwhile another command has put another there, and told the catalogue."""
    from loratool.library.recording.promised import Promised, PromisedMerge
    from registry import MergedAdapter

    def promise() -> None:
        with Registry.open(home_of_its_own) as catalogue:
            adapter = MergedAdapter(adapter="never", sha256="0" * 64, weight=1.0)
            with Promised(PromisedMerge.of(work / "merged", (adapter,), in_place=False), catalogue):
                die_now()

    killed(home_of_its_own, promise)
    with pytest.raises(LoratoolError):
        loratool.unmerge(work / "merged")
    merge(work)
    loratool.doctor()
    assert [[each[0] for each in row[7]] for row in rows(home_of_its_own)[0]] != [["never"]]
    assert len(rows(home_of_its_own)[0]) == 1
