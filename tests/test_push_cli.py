"""``loratool push`` as people type it: what it prints, asks and hides."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_stand_in import Cut, Failure, HubStandIn
from huggingface_hub import HfApi
from terminals import printed_until_the_end
from tiny_adapters import TinyAdapters
from tiny_models import TinyModels

import loratool
from loratool.cli import main

BASE = "org/tiny-llama"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pirate(hub: HubStandIn, tiny_models: TinyModels, tiny_adapters: TinyAdapters) -> str:
    """The catalogued adapter ``pirate``."""
    hub.create(BASE)
    loratool.base_add("tiny", tiny_models.folder("llama", "fp32"), hub_id=BASE)
    return loratool.add(tiny_adapters.folder("llama"), name="pirate", base="tiny").record.name


@pytest.fixture
def run(command: Run) -> Run:
    """Run ``loratool push WORDS...``."""
    return lambda *words: command("push", *words)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``loratool WORDS...`` in this process: its exit status, and what it printed."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loratool", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return call


def test_what_it_prints(hub: HubStandIn, pirate: str, run: Run, command: Run) -> None:
    status, out, err = run("--dry-run", "--license", "mit")
    assert (status, err) == (0, "")
    assert "4 files to send" in out and "license: mit" in out and "README.md" in out
    status, out, err = run("pirate", "--license", "mit")
    assert (status, err) == (0, "")
    assert f"Pushed pirate@1 to {hub.endpoint}/ada/pirate" in out
    assert "loratool pull ada/pirate" in out and "new, public" in out
    assert "Already there" in run("pirate", "ada/pirate")[1]
    (commit,) = [place.revision for place in loratool.show("pirate").record.locations if place.repo == "ada/pirate"]
    assert f"ada/pirate@{commit[:12]}" in command("show", "pirate")[1]
    status, out, _ = run("pirate", "--json", "--license", "apache-2.0")
    assert json.loads(out)["sent"] is True
    assert {file["path"]: file["state"] for file in json.loads(out)["files"]}["README.md"] == "changed"


def test_errors_are_one_sentence_and_show_no_token(hub: HubStandIn, pirate: str, run: Run) -> None:
    hub.faults += [
        Failure("POST", "/repos/create", status=403, message=f"Not with {hub.token}"),
        Failure("POST", "/repos/create", status=500),
        Cut("POST", "/repos/create"),
    ]
    for _ in range(3):
        status, out, err = run("pirate", "ada/pirate")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert hub.token not in err
    assert run("--merged")[0] == run("pirate", "")[0] == 2


def test_an_interrupt_behind_the_commit_says_what_the_hub_has_and_the_next_run_records_it(
    hub: HubStandIn, pirate: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(*_: object) -> None:
        raise KeyboardInterrupt

    def places() -> list[str | None]:
        return [place.repo for place in loratool.show(pirate).record.locations if place.repo]

    with monkeypatch.context() as patched:
        patched.setattr("registry.adapters.Adapters.add_location", struck)
        status, out, err = run(pirate)
    assert (status, out, places()) == (130, "", [])
    assert err == "Interrupted: ada/pirate has the files; run the command again to record that in the catalogue.\n"
    assert "Already there" in run(pirate)[1]
    assert places() == ["ada/pirate"]


def test_an_interrupt_while_the_hub_commits_says_that_the_commit_may_be_there(
    hub: HubStandIn, pirate: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = HfApi.create_commit

    def struck(self: HfApi, *arguments: object, **options: object) -> None:
        commits(self, *arguments, **options)  # type: ignore[call-overload]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "create_commit", struck)
        status, _, err = run(pirate)
    assert (status, err.count("\n")) == (130, 1)
    assert "ada/pirate has all of the files or none; run the command again" in err
    assert "nothing half done" not in err
    before = hub.repositories["ada/pirate"].head
    assert "Already there" in run(pirate)[1]
    assert hub.repositories["ada/pirate"].head == before
    assert [place.repo for place in loratool.show(pirate).record.locations if place.repo] == ["ada/pirate"]


def test_a_process_of_its_own_pushes_to_hf_endpoint_without_torch_and_keeps_the_token_to_itself(
    hub: HubStandIn, pirate: str, home_of_its_own: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from loratool.cli import cli; cli.main(['push', '--private'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | hub.environment(tmp_path / "hf") | {"HF_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["ada/pirate"].private
    kept = [file.read_bytes() for file in [*home_of_its_own.rglob("*"), *tmp_path.rglob("*")] if file.is_file()]
    sent = [blob.data for blob in hub.repositories["ada/pirate"].head.files.values()]
    assert not [
        data for data in [done.stdout.encode(), done.stderr.encode(), *kept, *sent] if hub.token.encode() in data
    ]


def test_on_a_terminal_it_asks_before_a_public_repository_is_made(hub: HubStandIn, pirate: str, tmp_path: Path) -> None:
    def answer(text: bytes, *words: str) -> tuple[int, str]:
        mine, its = pty.openpty()
        child = subprocess.Popen(
            [sys.executable, "-m", "loratool", "push", *words],
            stdin=its,
            stdout=its,
            stderr=its,
            env=os.environ | hub.environment(tmp_path / "hf"),
        )
        os.write(mine, text)
        printed = printed_until_the_end(mine, its, child)
        os.close(mine)
        os.close(its)
        return child.wait(), printed.decode()

    status, printed = answer(b"n\n")
    assert status == 1 and "Make the public repository ada/pirate" in printed and "nothing was pushed" in printed
    assert "ada/pirate" not in hub.repositories
    status, printed = answer(b"", "--yes")
    assert status == 0 and "Make the public" not in printed
    assert "ada/pirate" in hub.repositories
