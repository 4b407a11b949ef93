"""What a newcomer meets in the first hour: help on one screen, wrong guesses, names that are whole, bars with time left."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from terminals import ESCAPES, REPOSITORY, assert_fits, terminal

import loratool
from loratool.cli import COMMANDS, cli, main
from loratool.cli.guesses import GUESSES
from loratool.cli.plan_view import natural_order
from loratool.cli.rendering import ProgressBar, print_facts, print_notes, size
from loratool.cli.training_bar import TrainingBar
from loratool.errors import AdapterError, NotFoundError
from registry import AdapterFacts, Registry

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

DESTROYING = ("remove", "gc", "--force", "--now")


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False, prog_name="loratool")


# Help


def test_the_help_with_every_command_fits_a_screen_of_24_lines() -> None:
    lines = assert_fits(terminal("-h"))
    assert len(lines) < 24
    text = "\n".join(lines)
    for name, what in COMMANDS.items():
        assert re.search(rf"(^|  ){name} +{re.escape(what)}", text, re.MULTILINE), name


# Wrong guesses


@pytest.mark.parametrize(
    ("guess", "fits"),
    [
        ("rename", "loratool add PATH --name"), ("info", "loratool show"), ("serve", "loratool merge"),
        ("chat", "loratool merge"), ("help", "loratool --help"), ("import", "loratool add"),
        ("search", "loratool hub search"), ("ls", "loratool list"), ("rm", "loratool remove --help"),
        ("delete", "loratool remove --help"), ("compare", "loratool eval"),
    ],
)  # fmt: skip
def test_a_wrong_guess_gets_a_hint_that_fits(guess: str, fits: str) -> None:
    result = run(guess)
    assert result.exit_code == 2
    assert f"there is no command '{guess}'" in result.stderr
    assert fits in result.stderr


@pytest.mark.parametrize(
    "guess", [*GUESSES, "remov", "rmove", "removed", "renmae", "reomve", "prun", "nothing-like-it"]
)
def test_no_hint_typed_as_it_is_destroys_anything(guess: str) -> None:
    hint = run(guess).stderr.partition("; ")[2]
    for said in re.findall(r"'(loratool [^']+)'", hint):
        words = shlex.split(said)
        assert "--help" in words or not set(words) & set(DESTROYING), said
    for said in re.findall(r"'([^']+)'", hint):
        assert said.startswith(("loratool ", "hf "))


@pytest.mark.parametrize(
    ("guess", "hint"), [("rename", "base --help"), ("remov", "base remove --help"), ("ad", "base add")]
)
def test_a_group_hints_at_its_own_commands(guess: str, hint: str) -> None:
    result = run("base", guess)
    assert result.exit_code == 2
    assert f"'loratool {hint}'" in result.stderr


@pytest.mark.parametrize("guess", ["pirate:0.7", "pirate*0.7"])
def test_a_weight_after_a_colon_is_answered_with_how_it_is_written(guess: str) -> None:
    for words in (["merge", guess], ["combine", guess, "other", "--method", "cat", "--out", "x.st"]):
        result = run(*words)
        assert result.exit_code == 2
        assert "pirate=0.7" in result.stderr


def test_a_base_that_is_added_as_an_adapter_is_answered_with_base_add(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "my-base")
    for path in (base, base / "model.safetensors"):
        with pytest.raises(AdapterError, match=rf"base model.*'loratool base add my-base {re.escape(str(base))}'"):
            loratool.add(path)


def test_a_base_where_an_adapter_is_asked_for_is_answered_with_what_it_is(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters
) -> None:
    loratool.base_add("llama", tiny_models.folder("llama", "bf16"))
    loratool.add(tiny_adapters.folder("llama"), name="pirate")
    for call in (
        loratool.show,
        lambda name: loratool.tag(name, ["x"]),
        lambda name: loratool.merge([name], into="llama"),
    ):
        with pytest.raises(NotFoundError, match="'llama' is a base, not an adapter; 'loratool base show llama'"):
            call("llama")
    for call in (loratool.base_show, loratool.base_verify, lambda name: loratool.merge(["pirate"], into=name)):
        with pytest.raises(NotFoundError, match="'pirate' is an adapter, not a base; 'loratool show pirate'"):
            call("pirate")
    with pytest.raises(NotFoundError, match="'loratool pull ada/pirate'"):
        loratool.add("ada/pirate")


def test_the_columns_of_a_list_are_what_it_is_sorted_by(home_of_its_own: Path) -> None:
    with Registry.open(home_of_its_own) as registry:
        for number, size in enumerate((5, 9, 7)):
            registry.adapters.add(f"a{number}", AdapterFacts(kind="lora", sha256=f"{number:064x}", size_bytes=size))
    order = {key: re.findall(r"^a\d", run("list", "--sort", key).stdout, re.MULTILINE) for key in ("size", "age")}
    assert order == {"size": ["a1", "a2", "a0"], "age": ["a2", "a1", "a0"]}
    assert run("list", "--sort", "size_bytes").stdout == run("list", "--sort", "size").stdout
    assert "'size'" in run("list", "--sort", "weight").stderr


# Tables


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_no_name_is_cut_in_a_list_however_narrow(columns: int, home_of_its_own: Path) -> None:
    names = ["pirate", "a-name-of-thirty-two-characters-", "mistral-7b-instruct-lora-for-the-law-of-the-high-seas-v2"]
    base = "Meta-Llama-3.1-8B-Instruct"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with Registry.open(home_of_its_own) as registry:
        registry.bases.add(base, "here", fingerprint="f" * 64)
        for number, name in enumerate(names):
            facts = AdapterFacts(
                kind="adalora", sha256=f"{number:064x}", size_bytes=123_456_789, rank=16, alpha=32.0,
                target_modules=targets, base_fingerprint="f" * 64,
            )  # fmt: skip
            registry.adapters.add(name, facts, tags=["speech", "of-the-sea"])
    printed = ESCAPES.sub("", terminal("list", columns=columns))
    words = printed.split()
    assert set(names) <= set(words)
    assert words.count(base) == 3
    if columns >= 80:
        assert all(len(line) <= columns for line in printed.splitlines())
    assert base in terminal("base", "list", columns=columns)


def test_tags_are_shown_where_there_are_any(home_of_its_own: Path) -> None:
    with Registry.open(home_of_its_own) as registry:
        registry.adapters.add("pirate", AdapterFacts(kind="lora", sha256="a" * 64, size_bytes=1))
        assert "TAGS" not in run("list").stdout
        registry.adapters.tag("pirate", "speech", "demo")
    assert re.search(r"^pirate .*  demo speech  ", run("list").stdout, re.MULTILINE)
    assert re.search(r"tags +demo speech", run("show", "pirate").stdout)


def test_a_plan_is_summed_up_and_listed_in_natural_order(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    words = [
        "merge",
        tiny_adapters.folder("llama"),
        "--into",
        tiny_models.folder("llama", "bf16"),
        "--out",
        tmp_path / "o",
    ]
    summed = run(*words, "--dry-run").stdout
    assert "q_proj x 2" in summed and "layers.0" not in summed
    every = re.findall(r"^model\S+", run(*words, "--dry-run", "--verbose").stdout, re.MULTILINE)
    assert len(every) == 14
    assert not (tmp_path / "o").exists()
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 2, 10, 1, 100)]
    assert [name.split(".")[2] for name in sorted(names, key=natural_order)] == ["0", "1", "2", "10", "100"]


def test_errors_and_notes_are_wrapped_between_words_and_what_is_quoted_stays_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "the adapter's base is not catalogued; add it with 'loratool base add smollm2 models/smollm2', or don't"
    print_notes([note])
    assert capsys.readouterr().err == f"note: {note}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    print_notes([note])
    assert ESCAPES.sub("", capsys.readouterr().err).splitlines() == [
        "note: the adapter's base is not catalogued; add it",
        "with 'loratool base add smollm2 models/smollm2',",
        "or don't",
    ]
    monkeypatch.setattr(sys, "argv", ["loratool", "show", "nobody"])
    with pytest.raises(SystemExit):
        main()
    lines = ESCAPES.sub("", capsys.readouterr().err).splitlines()
    assert lines == ["Error: no adapter 'nobody' is in the catalogue;", "see what is there with 'loratool list'"]
    monkeypatch.setattr(sys, "argv", ["loratool", "rename"])
    with pytest.raises(SystemExit):
        main()
    lines = ESCAPES.sub("", capsys.readouterr().err).splitlines()
    assert lines[-3:] == [
        "Error: there is no command 'rename';", "'loratool add PATH --name NEW' catalogues an",
        "adapter under a second name",
    ]  # fmt: skip


def test_facts_are_wrapped_between_words_and_a_command_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"loratool merge {'x' * 70} --into y"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    print_facts([("delivered", "99.1% of the update; 13.5% of elements changed"), ("next", command)])
    assert ESCAPES.sub("", capsys.readouterr().out).splitlines() == [
        "  delivered  99.1% of the update; 13.5%",
        "             of elements changed",
        f"  next       {command}",
    ]


def test_the_size_of_an_undo_is_said_with_and_without_the_adapters_copy(
    tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_models.folder("llama", "bf16"), tmp_path / "llama")
    result = run("merge", tiny_adapters.folder("llama"), "--into", base, "--out", tmp_path / "out", "--undo")
    (undo,) = (tmp_path / "out" / "loratool-undo").iterdir()
    sizes = {file.name: size(file.stat().st_size) for file in undo.iterdir()}
    assert f"undo         {sizes.pop('undo.st')}, and {sizes.popitem()[1]} for the adapter's copy" in result.stdout


def test_what_is_written_of_the_size_of_an_undo_is_what_was_measured() -> None:
    table = (
        (REPOSITORY / "benchmarks" / "RESULTS.md").read_text().partition("<!-- undo_size -->")[2].partition("<!-- /")[0]
    )
    measured = [
        (float(alone), float(whole)) for alone, whole in re.findall(r"MB \| ([\d.]+)%.* ([\d.]+)% \| undo", table)
    ]
    assert len(measured) == 3
    assert all(0.5 < alone < 1.5 and 3.5 < whole < 6 for alone, whole in measured)
    for page in ("README.md", "docs/undo.md"):
        text = " ".join((REPOSITORY / page).read_text().split())
        assert "about one percent of the weights that changed" in text
        assert "four to six percent" in text
    copies = [whole - alone for alone, whole in measured]
    assert f"{min(copies):.1f} to {max(copies):.1f}" in text
    assert f"{min(measured)[0]:.1f} to {max(measured)[0]:.1f} percent" in text


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What is drawn on stderr from here on, a terminal of 80 columns."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    return screen


def drawn(screen: Terminal) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", screen.getvalue())) if line.strip()]


def report(step: int, **others: Any) -> Any:
    return SimpleNamespace(
        step=step, loss=12.3456, tokens=123_456, seconds=1, peak_memory_bytes=123_456_789_012, **others
    )


def test_the_bar_of_a_training_keeps_its_time_left_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of_80_columns(monkeypatch)
    with TrainingBar() as bar:
        bar.begin_steps(0, 123_456)
        for step in range(1, 40):
            bar.stepped(report(step))
            if step == 2:
                bar.evaluated(step, 12.345)
        assert bar._training is not None
        bar._training.refresh()
    lines = [line for line in drawn(screen) if line.startswith("training")]
    assert re.search(r" 39/123456 +(\d+:)?\d?\d:\d\d loss 12\.346  held out 12\.345", lines[-1]), lines[-1]
    assert all(len(line) <= 80 for line in lines)


def test_steps_that_take_a_minute_have_a_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = screen_of_80_columns(monkeypatch), [0.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: clock[0])
    with TrainingBar() as bar:
        bar.begin_steps(0, 10)
        for step in range(1, 5):
            clock[0] += 60
            bar.stepped(report(step))
        assert bar._training is not None
        bar._training.refresh()
    assert " 4/10 06:00 " in drawn(screen)[-1]


def test_measuring_the_ranks_after_a_training_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of_80_columns(monkeypatch)
    with TrainingBar() as bar:
        bar.begin("loading the model", 1)
        bar.begin_steps(0, 2)
        bar.stepped(report(1))
        bar.begin("measuring the ranks", 64)
        bar.advance(48)
        assert bar._bars is not None
        bar._bars.refresh()
    assert re.search(r"measuring the ranks .*48/64", drawn(screen)[-1])


def test_progress_of_bytes_keeps_its_time_left_beside_a_long_label(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of_80_columns(monkeypatch)
    with ProgressBar() as bar:
        bar.begin("scoring a base of a very long name, which takes a line by itself alone", 12_345_678_901)
        bar.advance(1_234_567_890)
        assert bar._bars is not None
        bar._bars.refresh()
    line = drawn(screen)[-1]
    assert re.search(r"1\.2/12\.3 GB .*(-:--:--|\d:\d\d:\d\d)$", line), line
    assert len(line) <= 80
    assert Console(stderr=True).width == 80
