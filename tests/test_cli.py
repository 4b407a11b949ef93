"""The command line: help, exit statuses, errors of one sentence, JSON, tables that fit, pipes, hostile names."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from terminals import ESCAPES, assert_fits, terminal
from tiny_adapters import copy_with, save_plain_adapter
from tiny_models import digest

from loratool.cli import COMMANDS, cli, main
from loratool.errors import LoratoolError
from registry import AdapterFacts, Registry

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "sqlalchemy", "transformers", "rich")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """What it printed on stdout, as the one JSON value that it must be."""
        assert self.out.isascii()
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``loratool WORDS...`` in this process."""

    def call(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["loratool", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return Outcome(int(left.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def base(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("llama", "bf16")


@pytest.fixture
def adapter(tiny_adapters: TinyAdapters) -> Path:
    return tiny_adapters.folder("llama")


@pytest.fixture
def catalogued(run: Run, base: Path, adapter: Path) -> Run:
    """A catalogue with the base ``llama`` and the adapter ``pirate``."""
    assert run("base", "add", "llama", base).status == 0
    assert run("add", adapter, "--name", "pirate", "--base", "llama", "--tag", "speech").status == 0
    return run


def process(*words: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``loratool WORDS...`` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        timeout=120,
    )


def leaves(command: click.Command = cli, name: str = "loratool") -> Iterator[tuple[str, click.Command]]:
    """Every command with the words that it is called by, groups included."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from leaves(found, f"{name} {below}")


EVERY = dict(leaves())
LEAVES = [name for name, command in EVERY.items() if not isinstance(command, click.Group)]


def catalogue_of(home: Path, count: int, **facts: Any) -> None:
    """Put so many adapters into the catalogue, with names of many lengths."""
    known: dict[str, Any] = {"kind": "lora", "size_bytes": 937_056, "rank": 16, "alpha": 32.0, "dtype": "bf16"}
    with Registry.open(home) as registry, registry.writing():
        for number in range(count):
            name = f"adapter-{number:04}" + "-of-a-long-name" * (number % 6)
            registry.adapters.add(name, AdapterFacts(sha256=f"{number:064x}", **(known | facts)))


# Help


@pytest.mark.parametrize("name", EVERY)
def test_every_command_says_what_it_does_and_ends_with_examples(name: str, run: Run) -> None:
    words = name.split()[1:]
    short, long = run(*words, "-h"), run(*words, "--help")
    assert (short.status, short.err) == (0, "")
    assert short == long
    assert short.out.startswith(f"Usage: {name} ")
    assert re.search(r"^Examples?:\n  loratool ", short.out, re.MULTILINE)
    assert all(len(line) <= 100 for line in short.out.splitlines())


@pytest.mark.parametrize("name", EVERY)
def test_every_option_has_a_help_text(name: str) -> None:
    command = EVERY[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
            assert parameter.help.endswith((".", "..."))


def accepts(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is parsed without complaint, down to a command that would run."""
    ran = []
    for name in LEAVES:
        monkeypatch.setattr(EVERY[name], "callback", lambda *, name=name, **values: ran.append(name))
    words = shlex.split(line, comments=True)
    assert words[0] == "loratool"
    try:
        cli.main(words[1:], standalone_mode=False)
    except click.ClickException as error:
        pytest.fail(f"{line}: {error.format_message()}")
    assert len(ran) == 1


@pytest.mark.parametrize("name", EVERY)
def test_every_example_of_the_help_parses_and_is_of_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (EVERY[name].epilog or "").split("\n"):
        assert f"{line} ".startswith(f"{name} ")
        accepts(line, monkeypatch)


def test_every_command_line_of_the_readme_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("loratool ")]
    assert len(lines) >= 5
    for line in lines:
        accepts(line, monkeypatch)


def test_every_command_that_the_readme_speaks_of_exists_and_it_speaks_of_every_one() -> None:
    text = (REPOSITORY / "README.md").read_text()
    called = set(re.findall(r"`loratool ([a-z]+)", text))
    assert called <= set(COMMANDS)
    assert set(COMMANDS) <= called | set(re.findall(r"`([a-z]+)`", text))


def test_the_version_is_the_packages(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version") == Outcome(0, f"loratool {version('loratool')}\n", "")


# What is imported


def imported_by(*commands: Sequence[str | Path]) -> set[str]:
    """Which of the heavy packages these commands import, one after the other in one process; each must work."""
    code = f"""
import sys
from loratool.cli import main
for words in {[list(map(str, words)) for words in commands]}:
    sys.argv = ["loratool", *words]
    try:
        main()
    except SystemExit as left:
        assert not left.code, words
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name for name in HEAVY if f"'{name}'" in done.stderr.splitlines()[-1]}


def test_help_imports_nothing_heavy() -> None:
    assert imported_by(["--help"], ["--version"], *([*name.split()[1:], "-h"] for name in EVERY)) == set()


def test_list_imports_neither_torch_nor_sqlalchemy(catalogued: Run) -> None:
    everything = ["list", "--json", "--sort", "rank", "--base", "llama", "--tag", "speech", "--kind", "lora"]
    assert imported_by(["list"], everything) == set()


def test_the_catalogue_is_kept_without_torch(catalogued: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    commands: list[list[str | Path]] = [
        ["show", "pirate"],
        ["show", adapter],
        ["list", "--base", base],
        ["add", adapter, "--name", "second", "--base", "llama"],
        ["base", "add", "again", base],
        ["base", "show", "llama"],
        ["base", "verify", "llama"],
        ["tag", "pirate", "x"],
        ["export", "pirate", "--out", tmp_path / "out"],
        ["remove", "second"],
        ["doctor", "--deep", "--gc"],
        ["merge", "pirate", "--into", "llama", "--dry-run"],
    ]
    assert not imported_by(*commands) & {"torch", "transformers"}


# Exit status and errors


def test_a_command_that_works_exits_with_0_and_prints_nothing_on_stderr(catalogued: Run) -> None:
    done = catalogued("list")
    assert (done.status, done.err) == (0, "")
    assert "pirate" in done.out


FAILING: dict[str, list[str]] = {
    "an adapter that is not there": ["show", "nobody"],
    "a base that is not there": ["base", "show", "nobody"],
    "a path that is not there": ["add", "no/such.safetensors"],
    "an adapter to merge that is not there": ["merge", "nobody", "--into", "BASE"],
    "a base to merge into that is not there": ["merge", "ADAPTER", "--into", "./nowhere"],
    "a Hub id that cannot be reached": ["merge", "ADAPTER", "--into", "nobody/nothing"],
    "a model that no merge made": ["verify", "BASE"],
    "a model that no merge made, to unmerge": ["unmerge", "BASE"],
    "a base as adapter": ["add", "BASE"],
    "an adapter as base": ["base", "add", "adapter", "ADAPTER"],
    "a folder without weights": ["base", "add", "empty", "."],
    "a URL that is none": ["--registry", "nonsense", "list"],
    "a driver that is not installed": ["--registry", "oracle://user:secret@host/db", "list"],
    "a file that is no database": ["--registry", "sqlite:///BASE/config.json", "list"],
    "a registry in a folder that is not there": ["--registry", "sqlite:////nowhere/at/all.db", "add", "ADAPTER"],
    "an output that is no folder": ["merge", "ADAPTER", "--into", "BASE", "--out", "merged.safetensors"],
    "an output that is the base": ["merge", "ADAPTER", "--into", "BASE", "--out", "BASE", "--force"],
    "an alpha for an adapter that has one": ["add", "ADAPTER", "--alpha", "4"],
    "a sort by a base that is not there": ["list", "--base", "nobody"],
    "a version that is not there": ["show", "nobody@3"],
    "ties with one adapter": ["combine", "ADAPTER", "--method", "ties", "--density", "0.5", "--out", "x.st"],
    "a density that is NaN": ["combine", "ADAPTER", "--method", "magnitude-prune", "--density", "nan", "--out", "x.st"],
    "a model that is its own base": ["extract", "BASE", "--base", "BASE", "--rank", "2", "--out", "x.st"],
    "an energy that is NaN": ["extract", "BASE", "--base", "BASE", "--energy", "nan", "--out", "x.st"],
    "an adapter as tuned model": ["extract", "ADAPTER", "--base", "BASE", "--rank", "2", "--out", "x.st"],
    "a rank of 0": ["combine", "ADAPTER", "--method", "svd", "--rank", "0", "--out", "x.st"],
}


@pytest.mark.parametrize("case", FAILING)
def test_an_error_is_one_sentence_on_stderr_and_exit_status_1(
    case: str, run: Run, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"BASE": str(base), "ADAPTER": str(adapter)}
    words = [re.sub("BASE|ADAPTER", lambda match: places[match[0]], word) for word in FAILING[case]]
    before = digest(base)
    done = run(*words)
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(r"Error: [^\n]{20,700}\n", done.err)
    assert re.search(r"[;:(]", done.err.removeprefix("Error: ")), "it does not say what to do, or what was found"
    assert "Traceback" not in done.err
    assert "secret" not in done.err
    assert digest(base) == before
    assert list(tmp_path.iterdir()) == []


MISUSED: dict[str, list[str]] = {
    "no argument": ["add"],
    "no adapter to merge": ["merge", "--into", "llama"],
    "an unknown option": ["list", "--colour"],
    "an option that is no name": ["show", "-x"],
    "a number that is none": ["add", "x.safetensors", "--alpha", "much"],
    "a weight that is no number": ["merge", "pirate=much", "--into", "llama"],
    "a weight that is infinite": ["merge", "pirate=inf", "--into", "llama"],
    "a weight without a name": ["merge", "=0.5", "--into", "llama"],
    "a weight of a combination that is NaN": ["combine", "pirate=nan", "--method", "cat", "--out", "x.st"],
    "a method that is none": ["combine", "pirate", "--method", "slerp", "--out", "x.st"],
    "a rank that is no number": ["combine", "pirate", "--method", "svd", "--rank", "much", "--out", "x.st"],
    "no size of what is extracted": ["extract", "x", "--base", "y", "--out", "x.st"],
    "two sizes of what is extracted": ["extract", "x", "--base", "y", "--rank", "1", "--energy", "1", "--out", "x.st"],
    "a device that is none": ["merge", "pirate", "--into", "llama", "--device", "tpu"],
    "two outputs": ["merge", "pirate", "--into", "llama", "--in-place", "--out", "x"],
    "two outputs of an unmerge": ["unmerge", "x", "--in-place", "--out", "x"],
    "an order that is none": ["list", "--sort", "beauty"],
    "an empty path": ["add", ""],
    "an empty output": ["merge", "pirate", "--into", "llama", "--out", ""],
    "an unknown command": ["frobnicate"],
    "an unknown command of base": ["base", "frobnicate"],
    "an empty command": [""],
    "no command": [],
}


@pytest.mark.parametrize("case", MISUSED)
def test_wrong_usage_exits_with_2_and_says_so_on_stderr(case: str, run: Run) -> None:
    done = run(*MISUSED[case])
    assert (done.status, done.out) == (2, "")
    assert "Usage: loratool" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("typed", "meant"), [("lst", "list"), ("mrege", "merge"), ("unmegre", "unmerge"), ("doktor", "doctor")]
)
def test_an_unknown_command_shows_the_nearest(typed: str, meant: str, run: Run) -> None:
    assert f"'loratool {meant}'" in run(typed).err


def test_a_name_that_is_not_there_shows_the_nearest(catalogued: Run, base: Path) -> None:
    assert "'pirate'" in catalogued("show", "pirat").err
    assert "'pirate'" in catalogued("merge", "pirat", "--into", "llama").err
    assert "'llama'" in catalogued("merge", "pirate", "--into", "lama").err
    assert "pirate@1" in catalogued("show", "pirate@7").err


def test_debug_shows_the_traceback_and_still_exits_with_1() -> None:
    for words in (["--debug", "show", "nobody"], ["show", "nobody", "--debug"]):
        done = process(*words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback (most recent call last)" in done.stderr
        assert "NotFoundError" in done.stderr


def test_options_of_the_whole_may_stand_behind_the_command(run: Run, adapter: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'other.db'}"
    assert run("add", adapter, "--name", "there", "--registry", url).status == 0
    assert [entry["name"] for entry in run("list", "--json", f"--registry={url}").json()] == ["there"]
    assert run("list", "--json").json() == []


def test_an_error_that_nobody_foresaw_asks_for_a_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**options: Any) -> None:
        raise ZeroDivisionError("a\x1b[31mb")

    monkeypatch.setattr("loratool.library.list.list_adapters", fails)
    done = run("list")
    assert (done.status, done.out) == (1, "")
    assert "ZeroDivisionError" in done.err
    assert "--debug" in done.err
    assert "\x1b" not in done.err


def test_an_interrupt_exits_with_130_and_without_a_traceback() -> None:
    waiting = """
import signal, time
import loratool.library.list as listing
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in its background without one
def wait(**options):
    print("ready", flush=True)
    while True:  # an interrupt that comes before a wait is seen after it
        time.sleep(0.05)
listing.list_adapters = wait
sys.argv = ["loratool", "list"]
from loratool.cli import main
main()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{waiting}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("module", ["torch", "numpy.matrixlib", "torch.functional", "torch.optim"])
def test_an_interrupt_while_torch_is_imported_is_not_lost(
    module: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    program = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
module, sys.argv[1:] = sys.argv[1], sys.argv[2:]
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
from loratool.cli import run
run()
"""
    words = ["merge", str(adapter), "--into", str(base), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, module, *words], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip().startswith("Interrupted") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_interrupt_while_workers_are_waited_for_does_not_leave_their_locks_taken(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    program = """
import os, signal, sys
from concurrent.futures import _base
class Interrupting(_base._AcquireFutures):
    def __enter__(self):
        for future in self.futures:
            future._condition.acquire()
            os.kill(os.getpid(), signal.SIGINT)
_base._AcquireFutures = Interrupting
signal.signal(signal.SIGINT, signal.default_int_handler)
from loratool.cli import run
run()
"""
    words = ["merge", str(adapter), "--into", str(base), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip().startswith("Interrupted")
    assert not list(tmp_path.glob("*out*"))


def test_a_reader_that_goes_away_is_no_error(home_of_its_own: Path) -> None:
    catalogue_of(home_of_its_own, 200)
    child = subprocess.Popen(
        [sys.executable, "-m", "loratool", "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == "[\n"
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(timeout=60) == 0
    child.stderr.close()


@pytest.mark.parametrize("words", ["-h", "merge -h", "--version", "list", "doctor"])
def test_a_reader_that_has_gone_before_the_first_byte_is_no_error(words: str, home_of_its_own: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "loratool", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["list --json", "list", "--help", "--version", "show adapter-0000"])
def test_a_standard_output_that_takes_nothing_is_named_in_the_error(words: str, home_of_its_own: Path) -> None:
    catalogue_of(home_of_its_own, 200)
    for redirection, said in ((">/dev/full", "No space left on device"), (">&-", "standard output is closed")):
        command = f"{shlex.quote(sys.executable)} -m loratool {words} {redirection}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 1, done.stderr
        assert re.fullmatch(r"Error: [^\n]*standard output[^\n]*\n", done.stderr), done.stderr
        assert said in done.stderr


@pytest.mark.parametrize("words", [["list", "--json"], ["merge", "ADAPTER", "--into", "BASE", "--out", "OUT"]], ids=str)
def test_a_closed_standard_error_is_no_error(words: list[str], base: Path, adapter: Path, tmp_path: Path) -> None:
    known = {"ADAPTER": str(adapter), "BASE": str(base), "OUT": str(tmp_path / "out")}
    command = shlex.join([sys.executable, "-m", "loratool", *(known.get(word, word) for word in words)])
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0
    assert done.stdout


def test_a_closed_standard_input_is_no_error(home_of_its_own: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home_of_its_own)}
    environment.pop("HF_TOKEN", None)
    command = shlex.join([sys.executable, "-m", "loratool", "push", "someone/name"])
    done = subprocess.run(
        ["sh", "-c", f"{command} <&-"], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 1
    assert "log in with 'hf auth login'" in done.stderr


# JSON

SUMMARY = {
    "name", "version", "kind", "sha256", "rank", "alpha", "target_modules", "dtype", "size_bytes", "parameter_count",
    "base", "base_fingerprint", "base_model", "tags", "created_at",
}  # fmt: skip
RECORD = SUMMARY | {"ranks", "scaling", "recipe", "metrics", "config", "family", "format", "tensor_count"}
BASE = {
    "name", "source", "revision", "path", "base_fingerprint", "variant_of", "same_as", "architecture", "model_type",
    "parameter_count", "size_bytes", "dtype", "created_at", "downloaded",
}  # fmt: skip


def test_json_of_adapters_has_the_catalogues_words(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    run("base", "add", "llama", base)
    added = run("add", adapter, "--name", "pirate", "--base", "llama", "--json").json()
    assert added.keys() == RECORD | {"new", "notes"}
    assert added["new"] is True
    assert run("add", adapter, "--name", "pirate", "--json").json()["new"] is False
    (summary,) = run("list", "--json").json()
    assert summary.keys() == SUMMARY
    shown = run("show", "pirate", "--json").json()
    assert shown.keys() == RECORD | {
        "catalogued", "changes_nothing", "trained_beside", "parent", "parent_sha256", "versions", "ancestors", "descendants",
        "hub", "merges", "commands",
    }  # fmt: skip
    assert {key: shown[key] for key in SUMMARY} == summary
    assert (summary["rank"], summary["alpha"], summary["base"]) == (4, 8.0, "llama")
    assert set(shown["ranks"].values()) == {4}
    assert shown["parent"] is None
    assert run("tag", "pirate", "speech", "--json").json()["tags"] == ["speech"]
    assert run("tag", "pirate", "speech", "--remove", "--json").json()["tags"] == []
    assert run("export", "pirate", "--out", tmp_path / "out", "--json").json() == {"out": str(tmp_path / "out")}
    assert [entry.keys() for entry in run("remove", "pirate", "--json").json()] == [RECORD | {"children", "kept_until"}]
    assert run("list", "--json").json() == []


def test_json_of_bases_has_the_catalogues_words(run: Run, base: Path) -> None:
    added = run("base", "add", "llama", base, "--json").json()
    assert added.keys() == BASE
    assert (added["name"], added["path"], added["dtype"]) == ("llama", str(base), "bf16")
    assert run("base", "list", "--json").json() == [added]
    assert run("base", "show", "llama", "--json").json() == {**added, "adapters": [], "merges": []}
    assert run("base", "verify", "llama", "--json").json() == added
    assert run("base", "remove", "llama", "--json").json() == added
    assert run("base", "list", "--json").json() == []


def test_json_of_a_merge_and_back(catalogued: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["merge", "pirate=0.5", "--into", "llama", "--out", str(out), "--undo", "--json"]
    planned = catalogued(*words, "--dry-run").json()
    assert planned["dry_run"] is True
    assert not out.exists()
    merged = catalogued(*words).json()
    keys = {
        "out", "base", "base_fingerprint", "adapters", "output_fingerprint", "undo_file", "tensors", "delivery",
        "touched_bytes", "size_bytes", "output_size_bytes", "quantize", "base_as", "dequantize", "seconds", "dry_run",
        "notes", "changed_tensors", "unchanged", "tokenizer",
    }  # fmt: skip
    assert merged.keys() == planned.keys() == keys
    assert all(tensor.pop("delivery")["share"] > 0.9 for tensor in merged["tensors"])
    assert merged["tensors"] == planned["tensors"]
    assert merged["adapters"][0].keys() == {"adapter", "sha256", "weight"}
    assert (merged["adapters"][0]["adapter"], merged["adapters"][0]["weight"]) == ("pirate@1", 0.5)
    verified = catalogued("verify", out, "--json").json()
    assert verified.keys() == {
        "path", "output_fingerprint", "tensors", "files", "replayed", "delivery", "deliveries", "notes", "edited", "added",
    }  # fmt: skip
    assert verified["output_fingerprint"] == merged["output_fingerprint"]
    back = catalogued("unmerge", out, "--json").json()
    assert back.keys() == {"out", "method", "base_fingerprint", "inexact", "notes"}
    assert back["base_fingerprint"] == merged["base_fingerprint"]
    assert [entry["output"] for entry in catalogued("show", "pirate", "--json").json()["merges"]] == [str(out)]


def test_json_of_the_doctor(catalogued: Run) -> None:
    done = catalogued("doctor", "--json")
    assert done.status == 0
    said = done.json()
    (backup,) = said.pop("backups")
    assert backup.keys() == {"path", "made_at", "versions"}
    assert said == {
        "bases": 1, "adapters": 1, "versions": 1, "merges": 0, "findings": [], "freed_bytes": 0, "noted_merges": 0,
        "shared_with": [], "rebuilt": [], "rebuilt_bases": [], "not_rebuilt": [],
        "repaired": [], "trash": [], "emptied": [],
    }  # fmt: skip


def test_json_spells_out_what_could_drive_a_terminal(run: Run, home_of_its_own: Path) -> None:
    catalogue_of(home_of_its_own, 1, target_modules=["\x1b[31mq\u202e", "層"])
    done = run("list", "--json")
    assert done.json()[0]["target_modules"] == ["\x1b[31mq\u202e", "層"]
    assert all(line.isprintable() for line in done.out.splitlines())


# Tables and cards


def test_a_table_fits_the_terminal_with_long_names_and_wide_characters(home_of_its_own: Path) -> None:
    with Registry.open(home_of_its_own) as registry:
        registry.bases.add("b" * 36, "here", fingerprint="f" * 64)
        registry.adapters.add(
            "n" * 78,
            AdapterFacts(
                kind="lora",
                sha256="a" * 64,
                size_bytes=999_000_000,
                rank=1024,
                alpha=1.23457e-05,
                target_modules=["層" * 40, "注意力", "e\u0301" * 9, "\x1b[31mred\u202e"],
                base_fingerprint="f" * 64,
            ),
            tags=["speech", "two"],
        )
    heading, name, row = assert_fits(terminal("list"))
    assert heading.split() == ["NAME", "V", "KIND", "RANK", "TARGETS", "BASE", "TAGS"]
    assert name == "n" * 78
    assert re.fullmatch(r" +1  lora  1024  \?\[31mred…  b{36}  speech two", row)
    wide = assert_fits(terminal("list", columns=160), 160)
    assert wide[0].split() == ["NAME", "V", "KIND", "RANK", "ALPHA", "TARGETS", "BASE", "TAGS", "SIZE", "AGE"]
    assert re.search(r" 1024 +1\.23457e-05 .* b{36} .* 999 MB +now$", wide[-1])
    assert_fits(terminal("base", "list"))
    assert "b" * 36 in terminal("base", "list", columns=60)
    narrow = terminal("list", columns=60)
    assert "n" * 78 in narrow and "b" * 36 in narrow


def test_a_thousand_adapters_are_listed_in_order_and_no_name_is_cut(run: Run, home_of_its_own: Path) -> None:
    catalogue_of(home_of_its_own, 1_000, target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"])
    lines = ESCAPES.sub("", terminal("list")).splitlines()
    names = [entry["name"] for entry in run("list", "--json").json()]
    assert len(names) == 1_000
    assert [line.split()[0] for line in lines if line.startswith("adapter-")] == names
    rows = [line for line in lines if " lora " in line]
    assert len(rows) == 1_000
    assert {line[line.index("lora") - 5 : line.index("lora")] for line in rows} == {"  1  "}
    assert all(len(line) <= 80 for line in lines if line not in names)


def test_what_is_no_terminal_gets_whole_names_and_no_escapes(run: Run, home_of_its_own: Path) -> None:
    catalogue_of(home_of_its_own, 6)
    done = run("list")
    assert "adapter-0005" + "-of-a-long-name" * 5 in done.out
    assert "\x1b" not in done.out


def test_colours_are_left_out_where_they_are_not_wanted(catalogued: Run) -> None:
    assert "\x1b[" in terminal("list")
    assert "\x1b[" not in terminal("list", environment={"NO_COLOR": "1"})


def test_a_card_fits_the_terminal(catalogued: Run) -> None:
    lines = assert_fits(terminal("show", "pirate"))
    assert lines[0].startswith("╭─ pirate@1 ")
    text = "\n".join(lines)
    (entry,) = catalogued("list", "--json").json()
    assert entry["sha256"] in text
    for fact in ("lora", "q k v o gate up down", "(14 modules)", "llama", "speech", "fp32"):
        assert fact in text


def test_a_card_of_hostile_facts_shows_them_without_control_characters(run: Run, home_of_its_own: Path) -> None:
    hostile = "\x1b]0;owned\x07\u202e\x9b31m"
    catalogue_of(home_of_its_own, 1, target_modules=[hostile], base_model=hostile, ranks={hostile: 4})
    printed = run("show", "adapter-0000").out + run("list").out
    assert "owned" in printed
    assert all(line.isprintable() for line in printed.splitlines())


def test_the_plan_of_a_merge_fits_the_terminal(catalogued: Run) -> None:
    # Paths are shown whole; one of a name that fits says nothing of how deep the temporary folder lies.
    lines = assert_fits(terminal("merge", "pirate", "--into", "llama", "--dry-run", "--out", "merged"))
    assert ["TENSOR", "UPDATE", "STORAGE", "SIZE"] in [line.split() for line in lines]
    assert [line.split()[:3] for line in lines if "lora r=4" in line] == [
        [f"{name}_proj", "x", "2"] for name in ("down", "gate", "up", "k", "o", "q", "v")
    ]
    every = assert_fits(terminal("merge", "pirate", "--into", "llama", "--dry-run", "--verbose", "--out", "merged"))
    assert sum("lora r=4" in line for line in every) == 14
    assert any(line.split()[:1] == ["changes"] and "14 tensors" in line for line in lines)


def test_a_terminal_that_knows_no_wide_letters_is_no_error(home_of_its_own: Path) -> None:
    catalogue_of(home_of_its_own, 1, target_modules=["層"])
    done = process("show", "adapter-0000", environment={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u5c64" in done.stdout


@pytest.mark.parametrize("words", [["list"], ["base", "list"], ["list", "--tag", "none"]], ids=" ".join)
def test_an_empty_list_says_what_to_do_and_is_an_empty_list_in_json(words: Sequence[str], run: Run) -> None:
    done = run(*words)
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith(".\n")
    assert run(*words, "--json").json() == []


# A merge, as a person makes it


def printed_command(printed: str, label: str) -> list[str]:
    """The command that a result proposes under this label."""
    (line,) = [line for line in printed.splitlines() if line.strip().startswith(label)]
    words = shlex.split(line.split(label, 1)[1])
    assert words[0] == "loratool"
    return words[1:]


def test_the_commands_that_results_propose_work(
    run: Run, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proposed = printed_command(run("base", "add", "llama", base).out, "next")
    proposed = [str(adapter) if word == "ADAPTER" else word for word in proposed]
    proposed = printed_command(run(*proposed, "--name", "pirate").out, "next")
    merged = run(*proposed, "--out", "the merged model", "--undo")
    assert merged.status == 0
    assert (tmp_path / "the merged model" / "loratool.json").is_file()
    verified = run(*printed_command(merged.out, "check it"))
    assert verified.status == 0
    assert verified.out.startswith("Verified the merged model\n")
    assert run(*printed_command(merged.out, "take it out")).status == 0
    assert digest(tmp_path / "the merged model-unmerged") == digest(base)


def test_a_merge_in_place_and_out_again(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    import shutil

    model = shutil.copytree(base, tmp_path / "model")
    merged = run("merge", adapter, "--into", model, "--in-place")
    assert merged.status == 0
    assert digest(model) != digest(base)
    assert run(*printed_command(merged.out, "take it out")).status == 0
    assert digest(model) == digest(base)


def test_a_changed_byte_is_found_by_verify(catalogued: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    catalogued("merge", "pirate", "--into", "llama", "--out", out)
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    done = catalogued("verify", out)
    assert (done.status, done.out) == (1, "")
    assert "model" in done.err


def test_a_file_whose_name_holds_an_equals_sign_is_no_weight(
    run: Run, base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = copy_with(adapter, tmp_path / "rank=4")
    planned = run("merge", copy, "--into", base, "--dry-run", "--json").json()
    assert planned["adapters"][0]["weight"] == 1.0
    planned = run("merge", f"{copy}=-0.25", "--into", base, "--dry-run", "--json").json()
    assert planned["adapters"][0]["weight"] == -0.25


def test_a_weight_on_a_name_too_long_for_a_file_is_no_part_of_the_name(run: Run, base: Path) -> None:
    without = run("merge", "a" * 300, "--into", base)
    assert (without.status, without.out) == (1, "")
    assert run("merge", "a" * 300 + "=0.5", "--into", base) == without


def test_notes_go_to_stderr(run: Run, base: Path, adapter: Path) -> None:
    done = run("merge", adapter, "--into", base, "--dry-run")
    assert done.err.startswith("note: ")
    assert "fingerprint" in done.err
    assert "note:" not in done.out


def test_an_alpha_for_a_catalogued_adapter_is_refused(catalogued: Run, tmp_path: Path) -> None:
    for name in ("pirate", "pirate@1"):
        for words in (["merge", name, "--into", "llama"], ["export", name]):
            done = catalogued(*words, "--alpha", "4", "--out", tmp_path / "out")
            assert (done.status, done.out) == (1, "")
            assert f"'{name}' states its own alpha; leave --alpha out" in done.err
    assert not (tmp_path / "out").exists()


# Hostile names

HOSTILE: dict[str, str] = {
    "a slash": "/",
    "the folder above": "..",
    "a path above": "../../etc/passwd",
    "a folder": "a/b",
    "a control character": "a\x1b[31mb",
    "a line break": "a\nb",
    "a bell": "\x07",
    "a mark that turns the text": "a\u202eb",
    "300 letters": "a" * 300,
    "5,000 letters": "a" * 5_000,
    "nothing": "",
    "a blank": " ",
    "an option": "--name",
    "a short option": "-x",
    "a dot in front": ".hidden",
    "another alphabet": "é",
    "a version without a name": "@1",
    "a version that is none": "pirate@",
    "version 0": "pirate@0",
    "a version out of range": "pirate@99999999999999999999",
    "a percent sign": "%s%n",
    "a quote": "a'; DROP TABLE adapters; --",
    "a null written out": "a\\x00b",
    "half a character": "a\udcff",
}

PLACES: dict[str, list[str]] = {
    "show": ["show", "NAME"],
    "remove": ["remove", "NAME"],
    "tag": ["tag", "NAME", "x"],
    "a tag": ["tag", "pirate", "NAME"],
    "a tag at add": ["add", "ADAPTER", "--tag", "NAME"],
    "a name at add": ["add", "ADAPTER", "--name", "NAME"],
    "a base at add": ["add", "ADAPTER", "--base", "NAME"],
    "a path at add": ["add", "NAME"],
    "a name of a base": ["base", "add", "NAME", "BASE"],
    "a source of a base": ["base", "add", "other", "NAME"],
    "a base": ["base", "show", "NAME"],
    "a base to verify": ["base", "verify", "NAME"],
    "a base to remove": ["base", "remove", "NAME"],
    "a variant": ["base", "add", "other", "BASE", "--variant-of", "NAME"],
    "an adapter to merge": ["merge", "NAME", "--into", "llama"],
    "a base to merge into": ["merge", "pirate", "--into", "NAME"],
    "a merge to verify": ["verify", "NAME"],
    "a merge to take out": ["unmerge", "NAME"],
    "an adapter to export": ["export", "NAME", "--out", "out"],
    "a base to list": ["list", "--base", "NAME"],
    "a registry": ["--registry", "NAME", "list"],
}


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_name_is_refused_and_nothing_changes(
    place: str, catalogued: Run, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    before, listed = digest(base), catalogued("list", "--json").out
    for case, name in HOSTILE.items():
        known = {"NAME": name, "BASE": str(base), "ADAPTER": str(adapter)}
        done = catalogued(*(known.get(word, word) for word in PLACES[place]))
        assert done.status in {1, 2}, case
        assert done.out == "", case
        assert done.err.startswith("Error: ") or "\nError: " in done.err, case
        assert "Traceback" not in done.err and "unexpected" not in done.err, f"{case}: {done.err}"
        assert all(line.isprintable() for line in done.err.splitlines()), case
        assert max(map(len, done.err.splitlines())) < 1_200, case
    assert list(work.iterdir()) == []
    assert digest(base) == before
    assert catalogued("list", "--json").out == listed


@pytest.mark.parametrize("out", ["/", "..", ".", "mine///", "a" * 300, "/proc/nowhere/out", "/dev/null", "a\udcff/b"])
def test_a_hostile_output_is_refused_and_nothing_is_written(
    out: str, catalogued: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "above" / "work"
    (work / "mine").mkdir(parents=True)
    (work / "mine" / "mine.txt").write_text("mine")
    (work / "a\udcff").write_text("a file")
    before = digest(tmp_path)
    monkeypatch.chdir(work)
    for force in ([], ["--force"]):
        for words in (["merge", "pirate", "--into", "llama"], ["export", "pirate"]):
            done = catalogued(*words, "--out", out, *force)
            assert (done.status, done.out) == (1, ""), words
            assert "Traceback" not in done.err and "unexpected" not in done.err, done.err
    assert digest(tmp_path) == before


# Registries that do not work


@pytest.mark.parametrize("words", [["list"], ["show", "x"], ["add", "ADAPTER"], ["doctor"], ["base", "list"]])
def test_a_registry_that_is_not_a_database_is_refused_and_kept(
    words: list[str], run: Run, adapter: Path, home_of_its_own: Path
) -> None:
    file = home_of_its_own / "registry.db"
    file.write_bytes(b"my diary, not a database. " * 200)
    before = file.read_bytes()
    done = run(*(str(adapter) if word == "ADAPTER" else word for word in words))
    assert (done.status, done.out) == (1, "")
    assert "is not a database" in done.err
    assert str(file) in done.err
    assert file.read_bytes() == before


def test_a_registry_that_is_read_only_can_be_read_and_is_not_written(
    catalogued: Run, home_of_its_own: Path, adapter: Path
) -> None:
    url = f"sqlite:///file:{home_of_its_own / 'registry.db'}?mode=ro&uri=true"
    assert [entry["name"] for entry in catalogued("--registry", url, "list", "--json").json()] == ["pirate"]
    assert catalogued("--registry", url, "show", "pirate").status == 0
    for words in (["add", adapter, "--name", "more"], ["tag", "pirate", "x"], ["remove", "pirate"]):
        done = catalogued("--registry", url, *words)
        assert (done.status, done.out) == (1, "")
        assert "cannot be written" in done.err
    assert [entry["tags"] for entry in catalogued("list", "--json").json()] == [["speech"]]


def test_a_registry_that_is_busy_is_read_and_a_writer_is_told_to_try_again(
    catalogued: Run, home_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(Registry.open.__func__.__kwdefaults__, "busy_timeout", 0.05)  # type: ignore[attr-defined]
    with closing(sqlite3.connect(home_of_its_own / "registry.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert len(catalogued("list", "--json").json()) == 1
        assert catalogued("show", "pirate").status == 0
        done = catalogued("tag", "pirate", "x")
        other.execute("ROLLBACK")
    assert (done.status, done.out) == (1, "")
    assert "busy" in done.err
    assert "try again" in done.err
    assert catalogued("tag", "pirate", "x").status == 0


@pytest.mark.parametrize("home", ["file", "file/below"])
@pytest.mark.parametrize(
    "words", [["add", "ADAPTER"], ["base", "add", "x", "BASE"], ["merge", "ADAPTER"], ["list"], ["doctor"]], ids=str
)
def test_a_home_that_cannot_be_is_an_error_that_names_it(
    home: str, words: list[str], run: Run, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / home))
    known = {"BASE": str(base), "ADAPTER": str(adapter)}
    more = ["--into", base, "--out", tmp_path / "out"] if words[0] == "merge" else []
    done = run(*(known.get(word, word) for word in words), *more)
    assert (done.status, done.out) == (1, "")
    assert "LORATOOL_HOME" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_home_that_is_not_there_yet_is_an_empty_catalogue_and_is_not_made_by_looking(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "new" / "home"))
    assert run("list", "--json").json() == []
    assert run("base", "list", "--json").json() == []
    assert run("doctor").status == 0
    assert run("show", "x").status == 1
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_a_hostile_module_name_is_shown_without_its_control_characters(
    run: Run, base: Path, tmp_path: Path
) -> None:
    folder = save_plain_adapter(tmp_path / "adapter", {"model.layers.0.\x1b[31mred\x07\u202e_proj": (24, 16)})
    assert run("add", folder, "--name", "adapter").status == 0
    for words in (["list"], ["show", "adapter"], ["merge", "adapter", "--into", base]):
        done = run(*words)
        assert "red" in done.out + done.err
        assert all(line.isprintable() for line in (done.out + done.err).splitlines())


def test_errors_of_the_library_are_what_the_command_line_prints(run: Run, tmp_path: Path) -> None:
    import loratool

    with pytest.raises(LoratoolError) as raised:
        loratool.add(tmp_path / "nothing")
    assert run("add", tmp_path / "nothing").err == f"Error: {raised.value}\n"
