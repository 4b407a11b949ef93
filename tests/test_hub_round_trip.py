"""Pushed, then pulled into an empty home: the same adapter. And what `hub search` finds of what was pushed."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from hub_adapters import files_of
from hub_stand_in import Cut, Failure, HubStandIn
from tiny_adapters import TinyAdapters, save_peft_adalora
from tiny_models import TinyModels, load

import loratool
from loratool.cli import cli
from loratool.errors import HubError, LoratoolError, NotFoundError
from registry import Registry

BASE = "org/tiny-llama"


@pytest.fixture
def llama(hub: HubStandIn, tiny_models: TinyModels) -> Path:
    """A base of this disk that is on the Hub, too."""
    folder = tiny_models.folder("llama", "fp32")
    hub.create(BASE).put(files_of(folder))
    return folder


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Go on as somebody else, with neither a catalogue nor a cache."""

    def move() -> None:
        monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "other-home"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other-cache"))

    return move


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def lineage(name: str) -> list[tuple[str, str, Any]]:
    return [(edge.parent, edge.operation, edge.details) for edge in loratool.show(name).ancestors]


def adapter_folder(kind: str, tiny_adapters: TinyAdapters, llama: Path, folder: Path) -> Path:
    if kind == "adalora":
        return save_peft_adalora(load(llama, "llama"), folder)
    if kind == "rslora":
        return tiny_adapters.folder("llama", r=8, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 2})
    return tiny_adapters.folder("llama", r=8, lora_alpha=16)


@pytest.mark.parametrize("kind", ["lora", "rslora", "adalora"])
def test_what_is_pushed_comes_back_as_it_was(
    kind: str, hub: HubStandIn, llama: Path, tiny_adapters: TinyAdapters, tmp_path: Path, empty_home: Any
) -> None:
    from huggingface_hub import constants

    fingerprint = loratool.base_add("llama", llama, hub_id=BASE).fingerprint
    before = loratool.add(
        adapter_folder(kind, tiny_adapters, llama, tmp_path / kind), name="pirate", base="llama"
    ).record
    loratool.push("pirate", "ada/pirate", private=True)
    empty_home()
    after = loratool.pull("ada/pirate").record
    facts = ("sha256", "kind", "rank", "ranks", "alpha", "scaling", "target_modules", "dtype", "parameter_count")
    assert [getattr(after, fact) for fact in facts] == [getattr(before, fact) for fact in facts]
    assert after.base_fingerprint == fingerprint
    assert after.base_model == BASE
    assert {**(after.config or {}), "base_model_name_or_path": None} == {
        **(before.config or {}), "base_model_name_or_path": None,
    }  # fmt: skip
    loratool.base_add("base", BASE)
    assert loratool.pull("ada/pirate").record.base == "base"
    (snapshot,) = Path(constants.HF_HUB_CACHE).glob("models--ada--pirate/snapshots/*")
    tokens = torch.arange(12).reshape(1, 12)
    expected = peft.PeftModel.from_pretrained(load(llama, "llama"), tmp_path / kind if kind == "adalora" else
                                              adapter_folder(kind, tiny_adapters, llama, tmp_path))(tokens).logits  # fmt: skip
    assert torch.equal(peft.PeftModel.from_pretrained(load(llama, "llama"), snapshot)(tokens).logits, expected)


def test_lineage_recipe_and_metrics_come_back(
    hub: HubStandIn, llama: Path, tiny_adapters: TinyAdapters, tmp_path: Path, empty_home: Any, home_of_its_own: Path
) -> None:
    loratool.base_add("llama", llama, hub_id=BASE)
    loratool.add(tiny_adapters.folder("llama", r=8, lora_alpha=16), name="captain", base="llama")
    loratool.truncate("captain", rank=2, out=tmp_path / "pirate", name="pirate")
    with Registry.open(home_of_its_own) as catalogue:
        catalogue.adapters.update("pirate", recipe={"steps": 3, "data": "pirate.jsonl"}, metrics={"loss": 0.25})
    before = loratool.show("pirate")
    edges = lineage("pirate")
    loratool.push("pirate", "ada/pirate")
    empty_home()
    after = loratool.pull("ada/pirate").record
    assert (after.recipe, after.metrics) == ({"steps": 3, "data": "pirate.jsonl"}, {"loss": 0.25})
    assert after.sha256 == before.record.sha256
    ((parent, operation, details),) = lineage("pirate")
    assert (parent, operation) in {("captain", "truncate"), ("captain@1", "truncate")}
    assert {key: value for key, value in details.items() if key in edges[0][2]} == edges[0][2]
    assert loratool.show("pirate").ancestors[0].parent_sha256 == before.ancestors[0].parent_sha256


def test_a_push_from_this_home_needs_no_pull(hub: HubStandIn, llama: Path, tiny_adapters: TinyAdapters) -> None:
    loratool.base_add("llama", llama, hub_id=BASE)
    loratool.add(tiny_adapters.folder("llama"), name="pirate", base="llama")
    loratool.push("pirate", "ada/pirate")
    hub.asked.clear()
    again = loratool.pull("ada/pirate")
    assert (again.record.reference, again.downloaded, hub.asked) == ("pirate@1", False, [])


def test_what_was_pulled_can_be_pushed_on(
    hub: HubStandIn, llama: Path, tiny_adapters: TinyAdapters, empty_home: Any
) -> None:
    loratool.base_add("llama", llama, hub_id=BASE)
    loratool.add(tiny_adapters.folder("llama"), name="pirate", base="llama")
    loratool.push("pirate", "ada/pirate")
    empty_home()
    first = loratool.pull("ada/pirate").record
    loratool.push("pirate", "ada/copy")
    assert loratool.pull("ada/copy", name="copy").record.sha256 == first.sha256


# Search


@pytest.fixture
def filled(hub: HubStandIn) -> HubStandIn:
    def card(base: str, licence: str) -> bytes:
        front = f"base_model: {base}\nbase_model_relation: adapter\nlibrary_name: peft\nlicense: {licence}"
        return f"---\n{front}\n---\n".encode()

    hub.create("ada/pirate").put({"README.md": card(BASE, "mit")})
    hub.create("crew/a-pirate-with-a-name-that-is-longer-than-most-names-are-" + "x" * 30, gated="manual").put(
        {"README.md": card(BASE, "apache-2.0")}
    )
    hub.create("ada/other").put({"README.md": card("org/other", "mit")})
    hub.create("ada/model").put({"README.md": b"# A model called pirate"})
    return hub


def test_adapters_of_a_base_are_found_by_its_name_or_id(filled: HubStandIn, llama: Path) -> None:
    loratool.base_add("llama", llama, hub_id=BASE)
    loratool.base_add("local", llama)
    for base in ("llama", BASE):
        found = loratool.hub_search(base=base)
        assert [each.repo.partition("/")[2][:8] for each in found] == ["pirate", "a-pirate"]
    assert found[0].license == "mit"
    assert (found[0].gated, found[1].gated) == (False, True)
    assert [each.repo for each in loratool.hub_search("pirate", base=BASE, limit=1)] == ["ada/pirate"]
    assert [each.repo for each in loratool.hub_search("other")] == ["ada/other"]
    assert loratool.hub_search("nothing") == ()
    with pytest.raises(NotFoundError, match="not from the Hub"):
        loratool.hub_search(base="local")
    with pytest.raises(LoratoolError, match="--base"):
        loratool.hub_search()


def test_the_table_of_a_search_fits_a_terminal(filled: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        cli.main(["hub", "search", "--base", BASE], standalone_mode=False)
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in terminal.getvalue().splitlines()]
    (longest,) = (each.repo for each in loratool.hub_search(base=BASE) if len(each.repo) > 80)
    assert lines.pop(2) == longest, "a name is never cut, and one too long for the terminal stands on a line of its own"
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["REPO", "DOWNLOADS", "LIKES", "UPDATED", "LICENSE"]
    assert lines[2].endswith("apache-2.0 (gated)")
    assert "loratool pull REPO" in lines[-1]
    listed = json.loads(run("hub", "search", "pirate", "--json").stdout)
    assert [set(each) for each in listed] == [{"repo", "downloads", "likes", "updated_at", "license", "gated"}] * 2
    assert "no such adapter" in run("hub", "search", "nothing").stdout
    assert run("hub", "search").exit_code == 2


def test_a_search_needs_the_network_and_a_sensible_answer(filled: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.hub.retry.time.sleep", lambda seconds: None)
    for fault in (Failure("GET", "/api/models", 2, 503), Cut("GET", "/api/models", 1), Cut("GET", "/api/models", 2)):
        filled.faults.append(fault)
        assert loratool.hub_search("pirate"), fault
        assert fault.times == 0
    describe = type(filled.repositories["ada/pirate"]).describe
    for wrong in ({"id": "../../x"}, {"id": "a\x1b[2J/b"}, {"tags": [5], "downloads": "many", "lastModified": None}):
        monkeypatch.setattr(
            "hub_stand_in.repositories.Repository.describe", lambda *a, w=wrong, **k: describe(*a, **k) | w
        )
        if "id" in wrong:
            with pytest.raises(HubError, match="is not a valid name"):
                loratool.hub_search(base=BASE)
    monkeypatch.setattr("hub_stand_in.repositories.Repository.describe", describe)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="loratool hub search needs the network"):
        loratool.hub_search("pirate")
