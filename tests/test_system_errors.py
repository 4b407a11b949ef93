"""An error of the operating system reaches a user as a sentence that says what to do, wherever it comes from."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loratool.cli import main
from loratool.cli.system_errors import ADVICE
from registry import Registry

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

NUMBERS = sorted({*ADVICE, errno.ENODEV, errno.EREMOTEIO, errno.EBADF})


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str, status: int = 1) -> str:
    monkeypatch.setattr(sys, "argv", ["loratool", *words])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (status, "")
    return " ".join(err.split())


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_each_is_named_and_comes_with_a_way_on(
    number: int, named: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), *(["/some/disk"] if named else []))

    monkeypatch.setattr(Registry, "open", fail)
    text = said(capsys, monkeypatch, "list")
    assert text.startswith("Error: '/some/disk' cannot" if named else "Error: a file or device cannot")
    assert os.strerror(number) in text and "unexpected" not in text and "--debug" not in text
    assert text.split("; ", 1)[1], "what to do"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_ran_out_is_said(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Registry, "open", fail)
    assert "not enough memory" in said(capsys, monkeypatch, "list")


@pytest.mark.parametrize(
    "words",
    ["list", "merge pirate --out o", "truncate pirate --rank 1", "train --base b --data d --name n", "verify o"],
)
def test_no_command_begins_in_a_folder_that_was_deleted(words: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from loratool.__main__ import main; "
    code += f"sys.argv = ['loratool', *{words.split()!r}]; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: the folder that you are in was deleted")


@pytest.mark.parametrize("home", ["/etc/passwd", None])
def test_a_home_that_is_none_is_said(
    home: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORATOOL_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    if home is None:
        # Python looks the user up then; here that user has no home either.
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    text = said(capsys, monkeypatch, "list")
    assert "unexpected" not in text and "set LORATOOL_HOME" in text


@pytest.mark.parametrize(
    ("what", "kind"), [("folder", "a folder"), ("circle", "a circle of links"), ("pipe", "a device, a pipe")]
)
def test_a_database_that_is_no_file_is_said(
    what: str, kind: str, home_of_its_own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = home_of_its_own / "registry.db"
    make = {"folder": place.mkdir, "circle": lambda: place.symlink_to(place), "pipe": lambda: os.mkfifo(place)}
    make[what]()
    text = said(capsys, monkeypatch, "list")
    assert f"registry.db' should be the registry's file, but is {kind}" in text and "move it away" in text


COMMANDS = (
    "add {}", "show {}", "merge {} --into {}", "base add b {}", "verify {}", "unmerge {}", "merge a --into b --out {}",
    "eval {} --data {}", "quantize {}", "extract {} --base {} --rank 1 --out o", "train --base {} --data {} --name n",
    "truncate {} --rank 1", "prune {} --budget 3", "combine {} {}=2 --method cat --out o.st", "estimate {} --rank 1",
)  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("what", ["nobody's home", "a long name", "a circle of links", "a pipe", "a file as a folder"])
def test_whatever_a_path_is_every_command_says_what_is_wrong(
    what: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    path = {
        "nobody's home": "~nosuchuser/x",
        "a long name": "./" + "x" * 300,
        "a circle of links": "./circle",
        "a pipe": "./pipe",
        "a file as a folder": "./file/below",
    }[what]
    text = said(capsys, monkeypatch, *words.format(*[path] * 2).split())
    assert text.startswith("Error: ") and "unexpected" not in text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["circle", "file", "pipe"]


OUTPUTS = (
    "merge {adapter} --into {base} --out {out}", "quantize {base} --out {out}", "export {adapter} --out {out}",
    "truncate {adapter} --rank 1 --svd --out {out}", "combine {adapter} {adapter}=2 --method svd --rank 2 --out {out}",
    "extract {base} --base {base} --rank 1 --out {out}", "unmerge {base} --out {out}",
    "show {adapter} --spectrum --plot {out}", "train --base {base} --data {data} --name n --out {out}",
)  # fmt: skip


@pytest.mark.parametrize(("out", "status"), [("~nosuchuser/x", 1), ("a\0b", 2)])
@pytest.mark.parametrize("words", OUTPUTS)
def test_an_output_that_no_path_leads_to_is_refused_and_nothing_is_made_in_its_place(
    words: str, out: str, status: int, tmp_path: Path, tiny_models: TinyModels, tiny_adapters: TinyAdapters,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text('{"text": "a cat"}\n')
    base, adapter = tiny_models.folder("llama", "bf16"), tiny_adapters.folder("llama")
    filled = [word.format(base=base, adapter=adapter, data="data", out=out) for word in words.split()]
    text = said(capsys, monkeypatch, *filled, status=status)
    assert "unexpected" not in text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data"]
