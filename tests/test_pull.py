"""`loratool pull`: adapters from the Hub's stand-in into the catalogue, checked, tied to their base, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hub_adapters import publish
from hub_stand_in import HubStandIn
from tiny_adapters import (
    save_kohya_dylora,
    save_plain_adapter,
    save_single_file,
)

import loratool
from loratool.cli import cli
from loratool.errors import AdapterError, HubError, NotFoundError
from registry import Location, RegistryError

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 12), "model.layers.0.self_attn.v_proj": (8, 12)}


@pytest.fixture(scope="module")
def pirate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder that names no base of this disk."""
    return save_plain_adapter(
        tmp_path_factory.mktemp("adapters") / "pirate", SHAPES, base_model_name_or_path="org/base"
    )


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain_adapter(
        tmp_path_factory.mktemp("newer") / "pirate", SHAPES, seed=2, base_model_name_or_path="org/base"
    )


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that loratool would have waited between its own attempts."""
    waits: list[float] = []
    monkeypatch.setattr("loratool.hub.retry.time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forbid the network, as HF_HUB_OFFLINE does."""
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored(home: Path) -> list[Path]:
    """The weights of every entry in the store."""
    return sorted(home.glob("store/*/*/adapter_model.safetensors"))


def catalogue(home: Path) -> list[str]:
    return [record.reference for record in loratool.list()]


# What comes in


def test_an_adapter_is_pulled_checked_and_catalogued_at_its_commit(
    hub: HubStandIn, pirate: Path, home_of_its_own: Path
) -> None:
    commit = publish(hub, "ada/pirate", pirate).head.oid
    result = loratool.pull("ada/pirate")
    assert (result.new, result.downloaded, result.revision) == (True, True, commit)
    record = result.record
    assert (record.reference, record.kind, record.rank, record.alpha) == ("pirate@1", "lora", 4, 8)
    assert record.sha256 == sha256(pirate / "adapter_model.safetensors")
    assert record.base_model == "org/base"
    assert Location(kind="hub", repo="ada/pirate", revision=commit) in record.locations
    (weights,) = stored(home_of_its_own)
    assert sha256(weights) == record.sha256
    assert json.loads((weights.parent / "adapter_config.json").read_text()) == json.loads(
        (pirate / "adapter_config.json").read_text()
    )


def test_only_what_is_needed_is_downloaded(hub: HubStandIn, pirate: Path) -> None:
    others = {
        "README.md": b"# Pirate",
        "optimizer.pt": b"x" * 100,
        "more/adapter_model.safetensors": b"no",
        "a.png": b"x",
    }
    publish(hub, "ada/pirate", pirate, others=others)
    loratool.pull("ada/pirate")
    asked = {request.path.rsplit("/", 1)[-1] for request in hub.asked if "/resolve/" in request.path}
    assert asked == {"adapter_config.json", "adapter_model.safetensors"}


def test_pulling_again_asks_nobody_and_changes_nothing(hub: HubStandIn, pirate: Path, newer: Path) -> None:
    commit = publish(hub, "ada/pirate", pirate).head.oid
    first = loratool.pull("ada/pirate")
    publish(hub, "ada/pirate", newer)
    hub.asked.clear()
    for repo in ("ada/pirate", f"ada/pirate@{commit}", "Ada/Pirate"):
        again = loratool.pull(repo)
        assert (again.record, again.new, again.downloaded, again.revision) == (first.record, False, False, commit)
    assert hub.asked == []


def test_a_branch_at_a_known_commit_downloads_nothing(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    loratool.pull("ada/pirate")
    hub.asked.clear()
    for again in (loratool.pull("ada/pirate@main"), loratool.pull("ada/pirate", update=True)):
        assert (again.record.version, again.downloaded) == (1, False)
    assert [request.path.split("?")[0] for request in hub.asked] == [
        "/api/models/ada/pirate/revision/main", "/api/models/ada/pirate",
    ]  # fmt: skip


def test_update_follows_the_branch_and_keeps_the_older_version(
    hub: HubStandIn, pirate: Path, newer: Path, home_of_its_own: Path
) -> None:
    publish(hub, "ada/pirate", pirate)
    loratool.pull("ada/pirate", name="mine")
    commit = publish(hub, "ada/pirate", newer).head.oid
    updated = loratool.pull("ada/pirate", update=True)
    assert (updated.record.reference, updated.new, updated.revision) == ("mine@2", True, commit)
    assert updated.record.sha256 == sha256(newer / "adapter_model.safetensors")
    assert catalogue(home_of_its_own) == ["mine@1", "mine@2"]
    assert len(stored(home_of_its_own)) == 2


def test_a_commit_that_changes_nothing_of_the_adapter_is_no_new_version(hub: HubStandIn, pirate: Path) -> None:
    first = publish(hub, "ada/pirate", pirate).head.oid
    loratool.pull("ada/pirate")
    second = publish(hub, "ada/pirate", pirate, others={"README.md": b"# Better"}).head.oid
    updated = loratool.pull("ada/pirate", update=True)
    assert (updated.record.version, updated.new, updated.revision) == (1, False, second)
    assert [place.revision for place in updated.record.locations if place.repo] == [first, second]
    hub.asked.clear()
    assert loratool.pull("ada/pirate").revision == second
    assert hub.asked == []


def test_branches_tags_and_commits_are_revisions(hub: HubStandIn, pirate: Path, newer: Path) -> None:
    repository = publish(hub, "ada/pirate", pirate)
    old = repository.head.oid
    repository.refs["refs/tags/v1"] = old
    repository.refs["refs/pr/1"] = old
    publish(hub, "ada/pirate", newer)
    for revision in ("v1", "refs/pr/1", old):
        result = loratool.pull(f"ada/pirate@{revision}")
        assert (result.revision, result.record.sha256) == (old, sha256(pirate / "adapter_model.safetensors"))
    assert loratool.pull("ada/pirate@main").record.reference == "pirate@2"


@pytest.mark.parametrize(
    ("repo", "path", "name"),
    [
        ("ada/many/kinds/pirate", None, "pirate"),
        ("ada/many", "kinds/pirate/", "pirate"),
        ("ada/many/kinds/pirate/adapter_model.safetensors@main", None, "pirate"),
        ("https://huggingface.co/ada/many/tree/main/kinds/pirate", None, "pirate"),
        ("hf://ada/many/kinds/pirate", None, "pirate"),
    ],
)
def test_a_folder_inside_a_repository(repo: str, path: str | None, name: str, hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/many", pirate, inside="kinds/pirate", others={"kinds/other.safetensors": b"no"})
    result = loratool.pull(repo, path=path)
    assert result.record.name == name
    assert str(result.path_in_repo).startswith("kinds/pirate")
    assert result.record.sha256 == sha256(pirate / "adapter_model.safetensors")
    hub.asked.clear()
    assert not loratool.pull(repo, path=path).downloaded


def test_a_single_file_is_taken_where_there_is_exactly_one(hub: HubStandIn, pirate: Path, tmp_path: Path) -> None:
    file = save_single_file(pirate, tmp_path / "one.safetensors")
    hub.create("ada/file").put({"one.safetensors": file.read_bytes(), "README.md": b"# One", "a.png": b"x"})
    assert loratool.pull("ada/file").record.sha256 == sha256(file)
    kohya = save_kohya_dylora(tmp_path / "k.safetensors", SHAPES, r=4, alpha=2)
    repository = hub.create("ada/kohya")
    repository.put({"k.safetensors": kohya.read_bytes()})
    assert loratool.pull("ada/kohya").record.kind == "dylora"
    repository.put({"other.safetensors": b"no"})
    with pytest.raises(NotFoundError, match=r"'k.safetensors', 'other.safetensors'.*--path"):
        loratool.pull("ada/kohya@main")
    named = loratool.pull("ada/kohya", path="k.safetensors")
    assert (named.record.name, named.path_in_repo) == ("k", "k.safetensors")


def test_a_bare_file_needs_its_alpha(hub: HubStandIn, pirate: Path) -> None:
    hub.create("ada/bare").put({"adapter_model.safetensors": (pirate / "adapter_model.safetensors").read_bytes()})
    with pytest.raises(AdapterError, match="--alpha"):
        loratool.pull("ada/bare")
    assert loratool.pull("ada/bare", alpha=16).record.alpha == 16
    assert not loratool.pull("ada/bare", alpha=16).downloaded
    assert loratool.pull("ada/bare").record.alpha == 16


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config.json": b"{}", "adapter_model.bin": b"x"},
            r"'adapter_model.bin' of 'ada/it' is a pickle.*save_pretrained",
        ),
        ({"pirate.pt": b"x"}, "is a pickle"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, "whole model.*loratool base add NAME ada/it"),
        ({"one/adapter_model.safetensors": b"x", "two/adapter_model.safetensors": b"x"}, r"'one', 'two'.*--path"),
        ({"README.md": b"# Nothing"}, "holds no adapter"),
        ({}, "holds no adapter"),
    ],
)
def test_what_is_no_adapter_is_refused_with_what_to_do(
    files: dict[str, bytes], message: str, hub: HubStandIn, home_of_its_own: Path
) -> None:
    hub.create("ada/it").put(files)
    with pytest.raises((AdapterError, NotFoundError), match=message):
        loratool.pull("ada/it")
    assert catalogue(home_of_its_own) == []
    assert not [request for request in hub.asked if "/resolve/" in request.path]


@pytest.mark.parametrize(
    "repo",
    ["", "pirate", "../ada/pirate", "ada/..", "ada/pirate/../x", "ada/pirate@", "ada/pirate@../../x",
     "ada/pi\x1brate", "ada/pirate@a\nb", "/ada/pirate", "ada--x/pirate", "ada/pirate/" + "a" * 300],
)  # fmt: skip
def test_an_address_that_is_none_is_refused_before_anybody_is_asked(repo: str, hub: HubStandIn) -> None:
    with pytest.raises(NotFoundError) as raised:
        loratool.pull(repo)
    assert str(raised.value).isprintable()
    assert hub.asked == []


# Names in the catalogue


def test_a_strangers_adapter_never_becomes_a_version_of_ones_own(hub: HubStandIn, pirate: Path, newer: Path) -> None:
    loratool.add(pirate, name="pirate")
    publish(hub, "eve/pirate", newer)
    with pytest.raises(loratool.LoratoolError, match=r"'pirate' is catalogued already.*--name.*'eve-pirate'"):
        loratool.pull("eve/pirate")
    assert [record.reference for record in loratool.list()] == ["pirate@1"]
    assert loratool.pull("eve/pirate", name="eve-pirate").record.reference == "eve-pirate@1"


def test_what_is_ones_own_and_on_the_hub_too_is_one_entry(hub: HubStandIn, pirate: Path) -> None:
    loratool.add(pirate, name="pirate")
    publish(hub, "ada/pirate", pirate)
    result = loratool.pull("ada/pirate")
    assert (result.record.reference, result.new) == ("pirate@1", False)
    assert [place.kind for place in result.record.locations] == ["store", "hub"]


def test_a_bad_name_is_refused_before_anybody_is_asked(hub: HubStandIn) -> None:
    with pytest.raises(RegistryError):
        loratool.pull("ada/pirate", name="../x")
    assert hub.asked == []


def test_files_that_went_from_the_store_are_pulled_again(hub: HubStandIn, pirate: Path, home_of_its_own: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    loratool.pull("ada/pirate")
    shutil.rmtree(home_of_its_own / "store")
    assert loratool.pull("ada/pirate").downloaded
    assert len(stored(home_of_its_own)) == 1


def test_where_lost_files_are_on_the_hub_is_said_with_path_and_commit(
    hub: HubStandIn, pirate: Path, newer: Path, home_of_its_own: Path, tmp_path: Path
) -> None:
    publish(hub, "ada/many", pirate, inside="pirate")
    first = loratool.pull("ada/many/pirate")
    publish(hub, "ada/many", newer, inside="pirate")
    shutil.rmtree(home_of_its_own / "store")
    with pytest.raises(RegistryError, match=f"'loratool pull ada/many/pirate@{first.revision}'"):
        loratool.export("pirate", tmp_path / "out")
    assert loratool.pull(f"ada/many/pirate@{first.revision}").record.reference == "pirate@1"
    loratool.export("pirate@1", tmp_path / "out")


# Its base


@pytest.mark.parametrize(
    ("config", "card", "expected"),
    [
        ("org/base", "org/other", "org/base"),
        ("/home/ada/models/base", "org/base", "org/base"),
        ("C:\\models\\base", ["org/base", "org/second"], "org/base"),
        (None, "org/base", "org/base"),
        ("models/base/3", None, "models/base/3"),
        (None, None, None),
        (7, {"a": 1}, None),
    ],
)
def test_the_base_is_what_the_configuration_or_else_the_card_names(
    config: Any, card: Any, expected: str | None, hub: HubStandIn, pirate: Path
) -> None:
    facts = json.loads((pirate / "adapter_config.json").read_text()) | {"base_model_name_or_path": config}
    readme = f"---\n{json.dumps({} if card is None else {'base_model': card})}\n---\n"
    others = {"adapter_config.json": json.dumps(facts).encode(), "README.md": readme.encode()}
    publish(hub, "ada/pirate", pirate, others=others)
    result = loratool.pull("ada/pirate")
    assert result.record.base_model == expected
    assert result.record.config == facts
    assert ("loratool base add base org/base" in result.notes[-1]) == (expected == "org/base")


# Offline


def test_what_is_in_the_cache_is_pulled_offline(
    hub: HubStandIn, pirate: Path, offline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = publish(hub, "ada/pirate", pirate).head.oid
    loratool.pull("ada/pirate")
    offline()
    hub.asked.clear()
    assert not loratool.pull("ada/pirate").downloaded
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "empty"))
    for repo, new in (("ada/pirate", True), (f"ada/pirate@{commit}", False)):
        result = loratool.pull(repo)
        assert (result.new, result.revision) == (new, commit)
    assert "this is the copy in the cache" in loratool.pull("ada/pirate", name="again").notes[0]
    for repo in ("ada/pirate@v2", "ada/other"):
        with pytest.raises(NotFoundError, match=f"loratool pull {repo}"):
            loratool.pull(repo)
    with pytest.raises(HubError, match="needs the network"):
        loratool.pull("ada/pirate", update=True)
    assert hub.asked == []


# The command line


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def test_what_the_command_prints(hub: HubStandIn, pirate: Path, newer: Path) -> None:
    commit = publish(hub, "ada/many", pirate, inside="pirate").head.oid
    first = run("pull", "ada/many/pirate")
    assert "Pulled pirate@1" in first.stdout
    assert f"ada/many/pirate@{commit[:12]}" in first.stdout
    assert "loratool base add base org/base" in first.stderr
    again = run("pull", "ada/many", "--path", "pirate")
    assert "Already there: pirate@1" in again.stdout
    assert "loratool pull ada/many/pirate --update" in again.stdout
    publish(hub, "ada/many", newer, inside="pirate")
    updated = json.loads(run("pull", "ada/many/pirate", "--update", "--json").stdout)
    assert (updated["name"], updated["version"], updated["new"], updated["path_in_repo"]) == (
        "pirate",
        2,
        True,
        "pirate",
    )
    shown = json.loads(run("show", "pirate@1", "--json").stdout)
    assert shown["hub"] == [{"repo": "ada/many", "revision": commit, "path_in_repo": "pirate"}]
    assert f"ada/many/pirate@{commit[:12]}" in run("show", "pirate@1").stdout


def test_show_takes_the_hub_id_of_what_was_pulled(hub: HubStandIn, pirate: Path) -> None:
    commit = publish(hub, "ada/pirate", pirate).head.oid
    with pytest.raises(NotFoundError, match="loratool pull ada/pirate"):
        loratool.tag("ada/pirate", ["x"])
    assert loratool.show("ada/pirate").place == f"ada/pirate@{commit[:12]}"
    record = loratool.pull("ada/pirate", name="mine").record
    assert loratool.show("ada/pirate").record == loratool.show(f"ada/pirate@{commit}").record == record


def test_a_pull_imports_no_torch(hub: HubStandIn, pirate: Path, tmp_path: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    program = "import sys, loratool; loratool.pull('ada/pirate'); sys.exit('torch' in sys.modules)"
    variables = {**os.environ, **hub.environment(tmp_path / "hf"), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_hub_is_asked_where_hf_endpoint_says_so(hub: HubStandIn, pirate: Path, tmp_path: Path) -> None:
    with HubStandIn() as mirror:
        publish(mirror, "ada/pirate", pirate)
        program = "import loratool; print(loratool.pull('ada/pirate').new)"
        variables = {**os.environ, **mirror.environment(tmp_path / "hf"), "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
        assert mirror.asked and not hub.asked
