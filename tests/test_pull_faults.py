"""What can go wrong between the Hub and the catalogue: a clear error or a retry that succeeds, and nothing half-catalogued."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_adapters import publish
from hub_stand_in import Corruption, Cut, Event, Failure, HubStandIn
from hub_stand_in.hub import TOKEN
from test_crash import _private_mounts
from tiny_adapters import save_plain_adapter

import loratool
from loratool.errors import AdapterError, HubError, LoratoolError, NotFoundError
from loratool.hub.repository import sensible_answers
from loratool.library.reporting.progress import Silent

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 12), "model.layers.0.self_attn.v_proj": (8, 12)}
ROOT = Path(__file__).parents[1]
NO_LFS = {"size": {}, "sha256": 1, "pointerSize": 0}


@pytest.fixture(scope="module")
def pirate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain_adapter(
        tmp_path_factory.mktemp("adapters") / "pirate", SHAPES, base_model_name_or_path="org/base"
    )


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that loratool would have waited between its own attempts."""
    waited: list[float] = []
    monkeypatch.setattr("loratool.hub.retry.time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def nothing_is_left(hub: HubStandIn, home_of_its_own: Path) -> Iterator[None]:
    """After the test the catalogue and the store are empty, and nothing under the home or the cache holds the token."""
    yield
    assert loratool.list() == ()
    assert list(home_of_its_own.glob("store/*/*")) == []
    hf_home = Path(os.environ["HF_HOME"])
    for folder in (home_of_its_own, hf_home):
        assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not list(hf_home.rglob("*.incomplete"))


def one_sentence(error: LoratoolError) -> str:
    text = str(error)
    assert text.isprintable() and TOKEN not in text
    assert ";" in text or ":" in text
    return text


# Who may not, and what is not there


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, None, "hf auth login"),
        (403, None, "hf auth login"),
        (401, "GatedRepo", "ask for access"),
        (403, "GatedRepo", "ask for access"),
        (404, "RepoNotFound", "there is no repository"),
        (404, "RevisionNotFound", "no revision"),
        (404, None, "404"),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/", "/resolve/"])
def test_a_refusal_is_a_clear_error(
    where: str, status: int, code: str | None, message: str, hub: HubStandIn, pirate: Path, waits: list[float]
) -> None:
    publish(hub, "ada/pirate", pirate)
    for method in ("GET", "HEAD"):
        hub.faults.append(Failure(method, where, 100, status, "No", code))
    with pytest.raises(LoratoolError) as raised:
        loratool.pull("ada/pirate")
    if where == "/api/models/" or code is not None:
        assert message in one_sentence(raised.value)
    assert waits == []


@pytest.mark.usefixtures("nothing_is_left")
def test_private_and_gated_repositories_of_others(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "eve/secret", pirate).private = True
    publish(hub, "eve/gated", pirate).gated = "manual"
    with pytest.raises(NotFoundError, match="private"):
        loratool.pull("eve/secret")
    with pytest.raises(HubError, match=r"gated.*ask for access at http://127.0.0.1:\d+/eve/gated"):
        loratool.pull("eve/gated")


@pytest.mark.usefixtures("nothing_is_left")
def test_a_token_that_does_not_count_is_said_and_not_shown(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "ada/pirate", pirate)
    for token in ("hf_wrongTokenThatNobodyMaySee", "hf_geh\u00e9imnisvoll", "wrong token\twith spaces"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(LoratoolError) as raised:
            loratool.pull("ada/pirate")
        assert token not in one_sentence(raised.value)


# What passes, and what does not


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_hub_that_fails_for_a_moment_is_asked_again(
    status: int, hub: HubStandIn, pirate: Path, waits: list[float], hub_waits: list[float]
) -> None:
    publish(hub, "ada/pirate", pirate)
    hub.faults += [
        Failure("GET", "/api/models/", 2, status, headers={"Retry-After": "5"}),
        Failure("HEAD", "/resolve/.*config", 2, status),
        Failure("GET", "/objects/", 2, status),
    ]
    assert loratool.pull("ada/pirate").new
    assert waits[:2] == [5.0, 5.0]
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("where", ["/api/models/", "/objects/"])
def test_a_hub_that_keeps_failing_is_given_up(where: str, hub: HubStandIn, pirate: Path, waits: list[float]) -> None:
    publish(hub, "ada/pirate", pirate)
    hub.faults.append(Failure("GET", where, 1000, 503))
    with pytest.raises(HubError, match=r"503.*again later"):
        loratool.pull("ada/pirate")
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("after", [None, 0, 100])
def test_a_connection_that_is_cut_is_taken_up_again(after: int | None, hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    hub.faults += [Cut("GET", "/objects/", 2, after), Cut("GET", "/api/models/", 1, after)]
    assert loratool.pull("ada/pirate").new


@pytest.mark.usefixtures("nothing_is_left")
def test_a_connection_that_is_always_cut_is_given_up(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    hub.faults.append(Cut("GET", "/api/models/", 1000))
    with pytest.raises(HubError, match=r"cannot be reached.*HF_ENDPOINT.*loratool pull ada/pirate"):
        loratool.pull("ada/pirate")


def test_a_hub_that_is_away_leaves_what_the_cache_has(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(hub, "ada/pirate", pirate)
    loratool.pull("ada/pirate")
    hub.faults.append(Cut("GET", "", 1000))
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "empty"))
    result = loratool.pull("ada/pirate")
    assert result.new and "this is the copy in the cache" in result.notes[0]
    with pytest.raises(HubError):
        loratool.pull("ada/pirate", update=True)


def test_what_huggingface_hub_logs_holds_no_secret(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "ada/pirate", pirate)
    seen = io.StringIO()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(handler, "stream", seen)
    loratool.pull("ada/pirate")
    log = logging.getLogger("huggingface_hub.file_download")
    log.warning("Bearer %s", TOKEN)
    log.warning("Error while downloading from https://a.b/c?repo=d: cut\nTrying to resume download...")
    logged = seen.getvalue()
    assert "Error while downloading" in logged
    assert "?repo=" not in logged and TOKEN not in logged


class Watching(Silent):
    """How many tries a download told of, one after the other."""

    def __init__(self) -> None:
        self.tries: list[int] = []

    def retrying(self, tries: int) -> None:
        self.tries.append(tries)


def test_a_download_that_is_cut_again_and_again_is_one_count_and_one_sentence(
    hub: HubStandIn, pirate: Path, waits: list[float], hub_waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "ada/pirate", pirate)
    seen = io.StringIO()
    (handler,) = logging.getLogger("huggingface_hub").handlers
    monkeypatch.setattr(handler, "stream", seen)
    hub.faults.append(Cut("GET", "/objects/", 1000, 0))
    watching = Watching()
    with pytest.raises(HubError) as cut:
        loratool.pull("ada/pirate", progress=watching)
    assert re.fullmatch(
        r"the download of 'adapter_model.safetensors' of 'ada/pirate' broke off \d+ times; check the network, and run "
        r"'loratool pull ada/pirate' again: it resumes where it stopped",
        str(cut.value),
    )
    assert watching.tries == list(range(1, len(watching.tries) + 1))
    assert f"broke off {len(watching.tries) + 1} times" in str(cut.value)
    assert seen.getvalue() == ""
    assert sum(waits) + sum(hub_waits) < 12
    hub.faults[:] = [Cut("GET", "/objects/", 5, 100)]
    assert loratool.pull("ada/pirate", progress=watching).new
    assert seen.getvalue() == ""
    assert not any(type(each).__name__ == "Retries" for each in handler.filters)


def test_a_cut_download_is_one_line_on_stderr_that_is_no_terminal(
    hub: HubStandIn, pirate: Path, tmp_path: Path
) -> None:
    publish(hub, "ada/pirate", pirate)
    hub.faults.append(Cut("GET", "/objects/", 3, 100))
    done = subprocess.run([sys.executable, "-m", "loratool", "pull", "ada/pirate"], env=environment(hub, tmp_path),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "note: the connection broke off; trying again"
    assert len(done.stderr.splitlines()) == 2  # and that it is tied to no base


def test_an_error_stops_the_other_downloads(hub: HubStandIn, pirate: Path) -> None:
    from loratool.hub.address import HubAddress
    from loratool.hub.download import fetch
    from loratool.hub.repository import look

    names = [f"{number}.safetensors" for number in range(12)]
    hub.create("ada/many").put({name: name.encode() * 1000 for name in names})
    snapshot = look(HubAddress.parse("ada/many"), "loratool pull ada/many")
    broken = {**snapshot.files, names[0]: replace(snapshot.files[names[0]], sha256="00" * 32)}
    with pytest.raises(HubError, match=r"'0\.safetensors'"):
        fetch(replace(snapshot, files=broken), names, "loratool pull ada/many")
    assert hub.count("GET", "/objects/") < 2 * len(names)


# Bytes


def test_bytes_that_were_damaged_once_are_got_once_more(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    hub.faults += [Corruption("GET", "/objects/"), Corruption("GET", "adapter_config.json")]
    assert loratool.pull("ada/pirate").new
    assert all(fault.times == 0 for fault in hub.faults)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("file", ["/objects/", "adapter_config.json", "loratool.json"])
def test_bytes_that_stay_wrong_are_refused_and_not_kept(file: str, hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate, facts={"schema": 1, "kind": "lora"})
    hub.faults.append(Corruption("GET", file, 1000))
    with pytest.raises(HubError, match=r"differs from what the Hub lists, in two downloads \(its (sha256|git id) is"):
        loratool.pull("ada/pirate")
    hub.faults.clear()
    assert loratool.pull("ada/pirate").new
    loratool.remove("pirate", now=True)


def test_what_was_damaged_in_the_cache_is_got_again(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    publish(hub, "ada/pirate", pirate)
    loratool.pull("ada/pirate")
    (weights,) = Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/adapter_model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"!")
    monkeypatch.setenv("LORATOOL_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="damaged in the cache"):
        loratool.pull("ada/pirate")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert loratool.pull("ada/pirate").new
    assert weights.read_bytes() == whole


@pytest.mark.usefixtures("nothing_is_left")
def test_a_hub_that_lists_another_size_is_not_believed(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = publish(hub, "ada/pirate", pirate)
    describe = type(repository).describe

    def lying(self: Any, commit: Any, *, blobs: bool = False) -> dict[str, Any]:
        found = describe(self, commit, blobs=blobs)
        for sibling in found["siblings"]:
            if "lfs" in sibling:
                sibling["lfs"]["size"] += 1
        return found

    monkeypatch.setattr(type(repository), "describe", lying)
    with pytest.raises(HubError, match="bytes instead of"):
        loratool.pull("ada/pirate")


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors", "..\\evil", "C:/evil"]
)
def test_a_name_that_leaves_its_folder_is_refused(name: str, hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate, others={name: b"x"})
    with pytest.raises(HubError, match="outside its folder"):
        loratool.pull("ada/pirate")
    hub.create("ada/one").put({name: b"x"})
    with pytest.raises(HubError, match="outside its folder"):
        loratool.pull("ada/one")
    assert not [request for request in hub.asked if "/resolve/" in request.path]


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    "answer",
    [
        {"sha": "../../../etc"}, {"sha": None}, {"sha": 5}, {"siblings": [{"rfilename": 5}]}, {"siblings": 7},
        {"siblings": [{"rfilename": "adapter_config.json", "size": "x", "blobId": [], "lfs": NO_LFS}]},
        {"cardData": {"base_model": {"a": "b"}}, "siblings": []}, {"lastModified": "never"},
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_is_a_clear_error(
    answer: Mapping[str, Any], hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = publish(hub, "ada/pirate", pirate)
    describe = type(repository).describe
    monkeypatch.setattr(type(repository), "describe", lambda *a, **k: describe(*a, **k) | dict(answer))
    with pytest.raises(LoratoolError) as raised:
        loratool.pull("ada/pirate")
    one_sentence(raised.value)


@pytest.mark.parametrize("error", [RecursionError, OverflowError])
def test_an_answer_beyond_all_bounds_makes_no_sense_either(error: type[Exception]) -> None:
    with pytest.raises(HubError, match=r"response for .* is invalid"), sensible_answers("ada/pirate"):
        raise error


class WebPage(BaseHTTPRequestHandler):
    """A web server that is no Hub."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *words: Any) -> None:
        pass


@pytest.mark.usefixtures("nothing_is_left")
def test_what_is_no_hub_is_said_to_be_none(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, waits: list[float], hub_waits: list[float]
) -> None:
    page = ThreadingHTTPServer(("127.0.0.1", 0), WebPage)
    threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
    endpoints = {f"http://127.0.0.1:{page.server_port}": "is invalid", "http://127.0.0.1:9": "cannot be reached",
                 "nonsense": "cannot be reached"}  # fmt: skip
    for endpoint, message in endpoints.items():
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with pytest.raises(HubError, match=rf"{message}.*HF_ENDPOINT"):
            loratool.pull("ada/pirate")
        with pytest.raises(HubError, match=rf"{message}.*HF_ENDPOINT"):
            loratool.hub_search("pirate")
    page.shutdown()
    page.server_close()
    assert waits == []
    assert hub_waits == [], "huggingface_hub asked somebody again who does not answer"


@pytest.mark.usefixtures("nothing_is_left")
def test_another_commit_than_the_one_that_was_asked_for_is_refused(
    hub: HubStandIn, pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = publish(hub, "ada/pirate", pirate)
    old = repository.history[-1].oid
    monkeypatch.setattr(type(repository), "find", lambda self, revision: self.head)
    with pytest.raises(HubError, match="a different commit"):
        loratool.pull(f"ada/pirate@{old}")


def test_a_repository_that_changes_meanwhile_is_pulled_at_the_commit_that_was_listed(
    hub: HubStandIn, pirate: Path
) -> None:
    repository = publish(hub, "ada/pirate", pirate)
    commit = repository.head.oid
    changed = {"adapter_model.safetensors": b"other", "adapter_config.json": b"{}"}
    hub.faults.append(Event("HEAD", "/resolve/", 1, lambda: repository.put(changed)))
    result = loratool.pull("ada/pirate")
    assert (result.revision, result.new) == (commit, True)
    assert repository.head.oid != commit


# What is recorded beside it


FACTS = {
    "schema": 1,
    "kind": "dylora",
    "scaling": "paper",
    "base_fingerprint": "ab" * 32,
    "recipe": {"steps": 3, "data": "../../etc/passwd", "note": "two\nlines"},
    "metrics": {"loss": 0.5},
    "lineage": {"operation": "truncate", "parents": [{"name": "captain@1", "sha256": "cd" * 32}], "rank": 4},
}


def test_facts_come_along(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate, facts=FACTS)
    record = loratool.pull("ada/pirate").record
    assert (record.kind, record.base_fingerprint) == ("dylora", "ab" * 32)
    assert (record.recipe, record.metrics) == (FACTS["recipe"], FACTS["metrics"])
    (edge,) = loratool.show("pirate").ancestors
    assert (edge.parent, edge.parent_sha256, edge.operation, edge.details) == (
        "captain@1", "cd" * 32, "truncate", {"rank": 4},
    )  # fmt: skip
    loratool.pull("ada/pirate", name="again")
    assert len(loratool.show("again").ancestors) == 1


def test_a_parent_that_is_catalogued_is_found_by_its_content(hub: HubStandIn, pirate: Path, tmp_path: Path) -> None:
    parent = loratool.add(save_plain_adapter(tmp_path / "captain", SHAPES, seed=9)).record
    lineage = {"operation": "prune", "parents": [{"name": "whatever", "sha256": parent.sha256}]}
    publish(hub, "ada/pirate", pirate, facts=FACTS | {"lineage": lineage})
    record = loratool.pull("ada/pirate").record
    assert [edge.parent for edge in loratool.show("pirate").ancestors] == ["captain@1"]
    circle = {"operation": "prune", "parents": [{"name": "child", "sha256": record.sha256}]}
    publish(hub, "ada/captain", tmp_path / "captain", facts={"schema": 1, "lineage": circle})
    assert loratool.pull("ada/captain").record.reference == "captain@1"
    assert loratool.show("captain").ancestors == ()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "evil"}, {"kind": ["dylora"]}, {"scaling": {}}, {"schema": "1"}, {"schema": 2}, {"schema": True},
        {"base_fingerprint": "../../x"}, {"base_fingerprint": "AB" * 32}, {"base_fingerprint": 7},
        {"recipe": "run me"}, {"metrics": [1]}, {"lineage": "none"},
        {"recipe": {"note": "\x1b[2J"}}, {"recipe": {"\u202e": 1}}, {"more": ["\x07"]},
        {"recipe": nested(40)}, {"recipe": {"note": "x" * 2_000_000}},
        {"lineage": {"operation": "truncate", "parents": "captain"}},
        {"lineage": {"operation": "rm -rf /", "parents": [{"name": "a"}]}},
        {"lineage": {"operation": "truncate", "parents": [{"name": 5}]}},
        {"lineage": {"operation": "truncate", "parents": [{"name": "a", "sha256": "x"}]}},
        {"lineage": {"operation": "truncate", "parents": [{"name": "a" * 5000}]}},
        {"lineage": {"operation": "truncate", "parents": [{"name": "a"}] * 100}},
    ],
)  # fmt: skip
def test_facts_that_loratool_would_not_write_are_refused(
    changes: Mapping[str, Any], hub: HubStandIn, pirate: Path, tmp_path: Path
) -> None:
    publish(hub, "ada/pirate", pirate, facts=FACTS | changes)
    with pytest.raises(AdapterError, match=r"loratool\.json") as raised:
        loratool.pull("ada/pirate")
    one_sentence(raised.value)
    with pytest.raises(AdapterError):
        loratool.merge(["ada/pirate"], into=tmp_path)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("facts", [b"", b"[1]", b"{", b"\xff", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100_000])
def test_facts_that_are_no_json_object_are_refused(facts: bytes, hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate, others={"loratool.json": facts})
    with pytest.raises(AdapterError, match=r"'ada/pirate.*' is not a valid JSON file"):
        loratool.pull("ada/pirate")


@pytest.mark.usefixtures("nothing_is_left")
def test_a_file_that_no_adapter_has_is_refused_before_it_is_downloaded(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate, others={"adapter_config.json": b" " * ((16 << 20) + 1)})
    with pytest.raises(AdapterError, match="bytes"):
        loratool.pull("ada/pirate")
    assert not [request for request in hub.asked if "/resolve/" in request.path]


@pytest.mark.usefixtures("nothing_is_left")
def test_weights_that_are_none_are_refused(hub: HubStandIn, pirate: Path) -> None:
    for content in (b"", b"not safetensors at all", (pirate / "adapter_model.safetensors").read_bytes()[:-4]):
        publish(hub, "ada/pirate", pirate, others={"adapter_model.safetensors": content})
        with pytest.raises(AdapterError):
            loratool.pull("ada/pirate")


# Processes


PULL = "import sys, json, loratool; r = loratool.pull('ada/pirate'); print(json.dumps([r.record.reference, r.new]))"


def environment(hub: HubStandIn, tmp_path: Path) -> dict[str, str]:
    own = hub.environment(tmp_path / "hf") | {"LORATOOL_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **own}


def test_two_processes_that_pull_at_once_both_succeed_with_one_copy(
    hub: HubStandIn, pirate: Path, tmp_path: Path
) -> None:
    publish(hub, "ada/pirate", pirate)
    running = [
        subprocess.Popen([sys.executable, "-c", PULL], env=environment(hub, tmp_path), stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    answers = []
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        answers.append(json.loads(out))
    assert [name for name, _ in answers] == ["pirate@1", "pirate@1"]
    assert sorted(new for _, new in answers) == [False, True]
    assert len(list((tmp_path / "home").glob("store/*/*/adapter_model.safetensors"))) == 1


def test_the_command_line_never_shows_the_token(hub: HubStandIn, pirate: Path, tmp_path: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    seen = ""
    for words in (
        ["pull", "ada/pirate"],
        ["pull", "ada/none", "--debug"],
        ["pull", "ada/none"],
        ["pull", "ada/pirate", "--json"],
    ):
        done = subprocess.run([sys.executable, "-m", "loratool", *words], env=environment(hub, tmp_path),
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == (1 if "none" in words[1] else 0), done.stderr
        seen += done.stdout + done.stderr
    assert "Pulled pirate@1" in seen and "Already there" not in seen
    assert TOKEN not in seen
    assert not re.search(r"%\|| B/s", seen), "a progress bar where nobody sees it"
    for path in (tmp_path / "home").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


@pytest.mark.parametrize("full", ["HF_HOME", "LORATOOL_HOME"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(full: str, hub: HubStandIn, tmp_path: Path) -> None:
    prefix = _private_mounts()
    if prefix is None:
        pytest.skip("no disk can be mounted here")
    large = save_plain_adapter(tmp_path / "large", {"q_proj": (4096, 512)}, r=64)
    publish(hub, "ada/pirate", large)
    disk = tmp_path / "disk"
    disk.mkdir()
    program = """
import loratool, os, pathlib
from loratool.errors import LoratoolError
from registry import RegistryError
try:
    loratool.pull("ada/pirate")
except (LoratoolError, RegistryError) as error:
    print(error)
left = [p for p in pathlib.Path(os.environ["LORATOOL_HOME"]).glob("store/*/*")]
left += list(pathlib.Path(os.environ["HF_HOME"]).rglob("*.incomplete"))
print(left, loratool.list())
"""
    variables = environment(hub, tmp_path) | {full: str(disk)}
    shell = 'mount -t tmpfs -o size=700k none "$0" && exec "$1" -c "$2"'
    done = subprocess.run([*prefix, "sh", "-c", shell, str(disk), sys.executable, program], env=variables,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, rest = done.stdout.splitlines()
    assert "space" in said or "room" in said
    assert "free" in said
    assert rest == "[] ()"
