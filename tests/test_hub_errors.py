"""Whatever the Hub answers, or does not: one sentence that says what to do, without a token."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from hub_stand_in import Cut, Failure, HubStandIn
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from loratool.cli import cli
from loratool.errors import HubError, HubUnreachableError, LoratoolError, NotFoundError
from loratool.hub.errors import hub_errors, refuse_offline, without_secrets


def explain(call: Callable[[], object], repository: str = "ada/pirate", revision: str | None = None) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught, hub_errors("loratool pull", repository, revision):
        call()
    message = str(caught.value)
    assert "\n" not in message and "hf_pirate" not in message
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, None, "your token is not valid here"),
        (403, None, "with one that may, or propose"),
        (412, None, "there is a new commit in the meantime"),
        (429, None, "wait some minutes"),
        (500, None, "run the command again later"),
        (503, None, "run the command again later"),
        (400, None, "follow that message"),
        (403, "GatedRepo", "ask for access at"),
        (401, "RepoNotFound", "or it is private"),
        (404, "RevisionNotFound", "has no revision 'next'"),
        (404, "EntryNotFound", "is not in 'ada/pirate'"),
    ],
)
def test_what_the_hub_answers(hub: HubStandIn, status: int, code: str | None, words: str) -> None:
    secret = f"no way, {hub.token}"
    hub.faults.append(Failure("GET", "/api/models/", status=status, code=code, message=secret))
    error = explain(lambda: HfApi().model_info("ada/pirate"), revision="next")
    assert words in str(error) and "no way, hf_…" in str(error)
    assert isinstance(error, NotFoundError if "NotFound" in str(code) else HubError)


def test_a_connection_that_breaks_or_is_not_there(hub: HubStandIn) -> None:
    hub.create("ada/pirate").put({"a.bin": b"arr"})
    hub.faults.append(Cut("GET", "/api/models/"))
    assert "check the network and HF_ENDPOINT" in str(explain(lambda: HfApi().model_info("ada/pirate")))
    hub.faults.append(Cut("GET", "/objects/", after=1, times=99))
    assert "the connection broke" in str(explain(lambda: hf_hub_download("ada/pirate", "a.bin")))
    nowhere = HfApi("http://127.0.0.1:1")
    assert "cannot be reached" in str(explain(lambda: nowhere.model_info("ada/pirate")))


def test_an_upload_that_fails_names_what_the_hub_said(hub: HubStandIn) -> None:
    hub.create("ada/pirate")
    hub.faults.append(Failure("PUT", "/objects/", status=403, message="Request has expired"))
    upload = {"path_or_fileobj": b"arr", "path_in_repo": "a.bin", "repo_id": "ada/pirate"}
    assert "Request has expired" in str(explain(lambda: HfApi().upload_file(**upload)))


def test_a_hub_without_xet_says_how_to_do_without(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    hub.create("ada/pirate")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    upload = {"path_or_fileobj": b"arr", "path_in_repo": "a.bin", "repo_id": "ada/pirate"}
    assert "HF_HUB_DISABLE_XET=1" in str(explain(lambda: HfApi().upload_file(**upload)))


def test_a_full_disk(hub: HubStandIn) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "blobs/1")

    assert "no space is left on the disk for 'blobs/1'" in str(explain(full))


def test_offline_names_the_command(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_offline("loratool push")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="loratool push needs the network, and HF_HUB_OFFLINE"):
        refuse_offline("loratool push")
    for call in (lambda: HfApi().model_info("ada/pirate"), lambda: snapshot_download("ada/pirate")):
        assert "loratool pull needs the network for 'ada/pirate'" in str(explain(call))


def test_without_a_token_and_without_a_name(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "write owner/name" in str(explain(lambda: HfApi().model_info("a/b/c"), "a/b/c"))
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in str(explain(lambda: HfApi().whoami()))


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), hub_errors("loratool pull", "ada/pirate"):
        _ = 1 / 0


def test_signatures_are_secrets_too() -> None:
    assert without_secrets("at https://cdn/x?Signature=abc for hf_abcdefgh") == "at https://cdn/x for hf_…"


@pytest.mark.parametrize(
    "words",
    [
        "merge models/nothing --into models/neither",
        "show models/nothing",
        "base add mine models/nothing",
        "estimate models/nothing --rank 4",
        "quantize models/nothing",
        "extract models/nothing --base models/neither --rank 2 --out o",
    ],
)
def test_a_mistyped_path_is_not_only_called_a_hub_id(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*arguments: object, **options: object) -> None:
        raise HubUnreachableError("the Hub cannot be reached")

    for module in ("hub.bases", "hub.pull", "library.resolving.hub_bases"):
        monkeypatch.setattr(f"loratool.{module}.look", look)
    result = CliRunner().invoke(cli, words.split())
    assert result.exit_code == 1
    assert str(result.exception).startswith(
        "'models/nothing' is not a file or folder here, so it was taken for a Hub id"
    )
