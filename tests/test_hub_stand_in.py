"""The stand-in of the Hub does for huggingface_hub's own client what the Hub does."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hub_stand_in import Corruption, Cut, Event, Failure, HubStandIn
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

WEIGHTS = bytes(range(256)) * 8
CARD = """---
base_model: org/base
base_model_relation: adapter
license: mit
tags: [lora]
---
# Pirate
"""


def test_what_is_uploaded_is_listed_and_downloaded(hub: HubStandIn, tmp_path: Path) -> None:
    api = HfApi()
    assert api.create_repo("ada/pirate").repo_id == "ada/pirate"
    (tmp_path / "deep").mkdir()
    (tmp_path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "deep" / "empty.bin").write_bytes(b"")
    (tmp_path / "README.md").write_text(CARD)
    api.upload_folder(repo_id="ada/pirate", folder_path=tmp_path)
    api.upload_file(repo_id="ada/pirate", path_or_fileobj=b"{}", path_in_repo="adapter_config.json")
    operations = [CommitOperationAdd("notes.txt", b"arr"), CommitOperationDelete("deep/empty.bin")]
    commit = api.create_commit("ada/pirate", operations, commit_message="Notes", commit_description="of a pirate")

    assert api.list_repo_files("ada/pirate") == [
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt",
    ]  # fmt: skip
    assert api.model_info("ada/pirate").sha == commit.oid
    assert [each.title for each in api.list_repo_commits("ada/pirate")] == [
        "Notes", "Upload adapter_config.json with huggingface_hub", "Upload folder using huggingface_hub", "initial commit",
    ]  # fmt: skip
    (info,) = api.get_paths_info("ada/pirate", "adapter_model.safetensors")
    assert info.lfs is not None and info.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert Path(hf_hub_download("ada/pirate", "notes.txt")).read_bytes() == b"arr"
    folder = Path(snapshot_download("ada/pirate"))
    assert folder.name == commit.oid
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "README.md").read_text() == CARD


def test_a_large_object_goes_up_in_parts_and_only_once(hub: HubStandIn) -> None:
    hub.multipart_over = 500
    api = HfApi()
    api.create_repo("ada/pirate")
    api.upload_file(repo_id="ada/pirate", path_or_fileobj=WEIGHTS, path_in_repo="a.safetensors")
    api.upload_file(repo_id="ada/pirate", path_or_fileobj=WEIGHTS, path_in_repo="b.safetensors")
    assert hub.count("PUT", "/parts/") == 5
    assert hub.repositories["ada/pirate"].head.files["b.safetensors"].data == WEIGHTS


def test_the_same_again_is_no_commit(hub: HubStandIn) -> None:
    api = HfApi()
    repository = hub.create("ada/pirate")
    for _ in range(2):
        api.upload_file(repo_id="ada/pirate", path_or_fileobj=WEIGHTS, path_in_repo="a.safetensors")
        api.upload_file(repo_id="ada/pirate", path_or_fileobj=b"arr", path_in_repo="notes.txt")
    assert len(repository.history) == 3


def test_branches_tags_and_pull_requests(hub: HubStandIn) -> None:
    api = HfApi()
    repository = hub.create("ada/pirate")
    first = repository.put({"notes.txt": b"one"})
    api.create_branch("ada/pirate", branch="next/one")
    api.create_tag("ada/pirate", tag="v1")
    api.upload_file(
        repo_id="ada/pirate",
        path_or_fileobj=b"two",
        path_in_repo="notes.txt",
        revision="next/one",
        parent_commit=first.oid,
    )
    stranger = HfApi(token=hub.account("eve"))
    opened = stranger.upload_file(
        repo_id="ada/pirate", path_or_fileobj=b"three", path_in_repo="notes.txt", create_pr=True
    )
    assert opened.pr_revision == "refs/pr/1"
    read = {
        revision: Path(hf_hub_download("ada/pirate", "notes.txt", revision=revision)).read_text()
        for revision in ("main", "v1", "next/one", "refs/pr/1", first.oid)
    }
    assert read == {"main": "one", "v1": "one", "next/one": "two", "refs/pr/1": "three", first.oid: "one"}
    refs = api.list_repo_refs("ada/pirate", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "next/one"]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(
            repo_id="ada/pirate", path_or_fileobj=b"no", path_in_repo="a", revision="next/one", parent_commit=first.oid
        )


def test_large_files_lie_on_another_server_and_the_token_stays_here(hub: HubStandIn) -> None:
    hub.create("ada/pirate", private=True).put({"a.safetensors": WEIGHTS})
    snapshot_download("ada/pirate")
    api, storage = ([each.token for each in hub.asked if each.storage is there] for there in (False, True))
    assert set(api) == {hub.token}
    assert storage == [None]


def test_ranges_of_a_file(hub: HubStandIn) -> None:
    hub.create("ada/pirate").put({"a.safetensors": WEIGHTS, "notes.txt": b"0123456789"})
    url = hf_hub_url("ada/pirate", "notes.txt")
    for header, body in (("bytes=2-4", b"234"), ("bytes=7-", b"789"), ("bytes=-2", b"89")):
        answer = get_session().get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, body)
    large = get_session().get(hf_hub_url("ada/pirate", "a.safetensors"), headers={"Range": "bytes=1-2"})
    assert large.content == WEIGHTS[1:3]


def test_who_may_see_what(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create("ada/secret", private=True)
    hub.create("org/gated", gated="manual").put({"notes.txt": b"arr"})
    assert HfApi().whoami()["name"] == "ada"
    assert HfApi().model_info("org/gated").gated == "manual"
    with pytest.raises(GatedRepoError, match="not in the authorized list"):
        hf_hub_download("org/gated", "notes.txt")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=hub.account("eve")).model_info("ada/secret")
    with pytest.raises(HfHubHTTPError, match="write token"):
        HfApi(token=hub.account("crew", role="read")).create_repo("crew/one")
    with pytest.raises(HfHubHTTPError, match="rights to create"):
        HfApi().create_repo("org/mine")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("org/gated", revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ada/secret", "nothing.txt")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_wrong").model_info("ada/secret")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(GatedRepoError, match="be authenticated"):
        hf_hub_download("org/gated", "notes.txt")


def test_models_are_found_by_what_their_cards_say(hub: HubStandIn) -> None:
    hub.page = 2
    for number in range(5):
        hub.create(f"ada/pirate{number}").put({"README.md": CARD.encode()})
    hub.create("ada/other").put({"README.md": b"---\nbase_model: org/else\n---\n"})
    hub.create("eve/secret", private=True).put({"README.md": CARD.encode()})
    found = HfApi().list_models(filter="base_model:adapter:org/base", cardData=True)
    assert [(each.id, each.card_data.license) for each in found] == [(f"ada/pirate{n}", "mit") for n in range(5)]
    assert len(list(HfApi().list_models(filter=["base_model:org/base", "lora"], limit=3))) == 3


def test_cards_are_checked(hub: HubStandIn) -> None:
    ModelCard(CARD).validate()
    for wrong in ("license: beer", "base_model: /home/ada/base", "base_model_relation: cousin", "datasets: ['a b']"):
        with pytest.raises(ValueError, match=r'"(license|base_model|base_model_relation|datasets)"'):
            ModelCard(f"---\n{wrong}\n---\n").validate()


def test_a_repository_with_another_name_redirects(hub: HubStandIn) -> None:
    hub.create("ada/pirate").put({"notes.txt": b"arr", "a.safetensors": WEIGHTS})
    hub.moved["ada/old"] = "ada/pirate"
    assert HfApi().model_info("ada/old").id == "ada/pirate"
    assert (Path(snapshot_download("ada/old")) / "a.safetensors").read_bytes() == WEIGHTS


def test_faults_pass_and_the_client_waits_as_it_is_told(hub: HubStandIn, hub_waits: list[float]) -> None:
    repository = hub.create("ada/pirate")
    hub.faults += [
        Failure("POST", "/preupload/", status=429, headers={"Retry-After": "7"}),
        Failure("POST", "/objects/batch", times=2),
        Cut("PUT", "/objects/"),
        Cut("GET", "/objects/", after=100),
    ]
    HfApi().upload_file(repo_id="ada/pirate", path_or_fileobj=WEIGHTS, path_in_repo="a.safetensors")
    assert Path(hf_hub_download("ada/pirate", "a.safetensors")).read_bytes() == WEIGHTS
    assert hub_waits == [8.0, 1, 2, 1, 1]
    assert len(repository.history) == 2
    assert all(fault.times == 0 for fault in hub.faults)


def test_faults_that_stay(hub: HubStandIn) -> None:
    repository = hub.create("ada/pirate")
    repository.put({"a.safetensors": WEIGHTS, "notes.txt": b"arr"})
    hub.faults += [Failure("GET", "/api/models/ada/pirate$", status=503, times=99), Corruption("GET", "/objects/")]
    with pytest.raises(HfHubHTTPError, match="503"):
        HfApi().model_info("ada/pirate")
    assert Path(hf_hub_download("ada/pirate", "a.safetensors")).read_bytes() != WEIGHTS
    hub.faults[:] = [Event("GET", "/tree/", happen=lambda: repository.put({"notes.txt": b"ahoy"}))]
    assert (Path(snapshot_download("ada/pirate", revision="main")) / "notes.txt").read_bytes() == b"arr"


def test_names_that_leave_the_folder_can_be_there(hub: HubStandIn) -> None:
    hub.create("ada/pirate").put({"../evil.txt": b"", "/etc/evil": b"", "a/../../evil": b""})
    assert {"../evil.txt", "/etc/evil", "a/../../evil"} <= set(HfApi().list_repo_files("ada/pirate"))
