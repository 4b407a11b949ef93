"""Killed or failing while it writes several adapters: each file is whole or not there, the catalogue knows all or none.

The runs are forks of a process of its own, this file as a program, struck at every call that changes files (test_crash).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_crash import die, fail, start, strike_at, tree, wait
from tiny_adapters import save_plain_adapter

import loratool
from loratool.errors import LoratoolError
from registry import RegistryError

RANKS = (1, 3)
OUTS = {"files": "cut.st", "folders": "cut"}
STRIKES = {"killed": die, "disk full": fail}


def truncate(work: Path, out: str) -> None:
    loratool.truncate(work / "adapter", rank=RANKS, scaling="paper", out=work / out, force=True)


def serve(work: Path, out: str, how: Callable[..., None]) -> list[dict[str, Any]]:
    """What lies in the folder and in the catalogue after each strike, and after the next run."""
    truncate(work, out)  # what is imported and made on the first use is there for every fork
    whole = outputs(work)
    report, found = work / "report", []
    clear(work)
    wait(start(lambda folder: truncate(folder, out), work, report, lambda: strike_at(1 << 60, how)), report)
    calls = json.loads(report.read_text())[1]
    assert outputs(work) == whole and calls > 20
    # Names are given and rows are committed at the end.
    for number in sorted({*range(1, calls, 15), *range(calls - 16, calls + 1)}):
        clear(work)
        arm = lambda number=number: strike_at(number, how)  # noqa: E731
        ending, _ = wait(start(lambda folder: truncate(folder, out), work, report, arm), report)
        left, known = outputs(work), children()
        truncate(work, out)
        found.append(
            {
                "at": number,
                "ending": ending,
                "broken": sorted(name for name, content in left.items() if whole.get(name) != content),
                "left": len(left),
                "missing": len(whole) - len(left),
                "known": known,
                "finished": outputs(work) == whole and len(children()) == len(RANKS),
            }
        )
    return found


def outputs(work: Path) -> dict[str, str]:
    """What stands under the outputs' names."""
    return {name: content for name, content in tree(work, hidden=False).items() if name.startswith("cut-")}


def clear(work: Path) -> None:
    for path in sorted(work.glob("*cut-*"), reverse=True):
        for below in sorted(path.rglob("*"), reverse=True):
            below.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
    for name in children():
        loratool.remove(name)


def children() -> list[str]:
    """The catalogued cuts; each is named only with its lineage."""
    references = [f"{record.name}@{record.version}" for record in loratool.list()]
    return [reference for reference in references if loratool.show(reference).ancestors]


if __name__ == "__main__":
    print(json.dumps(serve(Path(sys.argv[1]), sys.argv[2], STRIKES[sys.argv[3]])))


@pytest.mark.parametrize(("form", "how"), [("files", "killed"), ("folders", "killed"), ("files", "disk full")])
def test_of_several_outputs_each_is_whole_and_the_catalogue_knows_all_or_none(
    form: str, how: str, tmp_path: Path
) -> None:
    save_plain_adapter(tmp_path / "adapter", {"layers.0.first": (24, 16), "layers.1.first": (24, 16)}, r=3)
    command = [sys.executable, __file__, str(tmp_path), OUTS[form], how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    strikes = json.loads(done.stdout)
    assert any(each["left"] for each in strikes) or how == "disk full", "no strike came between the outputs' names"
    for each in strikes:
        assert each["ending"] == "killed by SIGKILL" if how == "killed" else not each["ending"].startswith("crashed"), (
            each
        )
        assert each["broken"] == [] and len(each["known"]) in (0, len(RANKS)), each
        assert not (each["known"] and each["missing"]), each
        assert each["finished"], each


def test_an_error_at_the_last_of_several_leaves_no_file_and_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.lineage import Lineage

    save_plain_adapter(tmp_path / "adapter", {"layers.0.first": (24, 16)}, r=3)
    record, calls = Lineage.record, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == len(RANKS):
            raise RegistryError("the disk is full; free some space")
        return record(*arguments, **options)

    monkeypatch.setattr(Lineage, "record", failing)
    with pytest.raises(RegistryError, match="the disk is full"):
        truncate(tmp_path, "cut.st")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert loratool.list() == ()


def test_an_adapter_that_does_not_fit_its_parents_base_leaves_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_plain_adapter(tmp_path / "adapter", {"layers.0.first": (24, 16)}, r=3)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weight = (
        tensors["base_model.model.layers.0.first.lora_B.weight"]
        @ tensors["base_model.model.layers.0.first.lora_A.weight"]
    )
    save_file({"layers.0.first.weight": weight}, base)
    loratool.base_add("base", base)
    loratool.add(tmp_path / "adapter", name="adapter", base="base")
    save_file({"layers.0.first.weight": weight.T.contiguous()[:5]}, base)
    with pytest.raises(LoratoolError):
        loratool.truncate("adapter", rank=RANKS, scaling="paper", out=tmp_path / "cut.st")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base.safetensors"]
    assert len(loratool.list()) == 1
