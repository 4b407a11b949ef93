"""A merged model on the Hub: weights, manifest and card, in one commit that an interruption only delays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_stand_in import Cut, Failure, HubStandIn
from huggingface_hub import ModelCard, snapshot_download
from tiny_adapters import TinyAdapters
from tiny_models import TinyModels, load

import loratool
from loratool.errors import CheckpointError, HubError, LoratoolError, NotFoundError, VerificationError

BASE = "org/tiny-llama"


@pytest.fixture
def merged(hub: HubStandIn, tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    """A merge of an adapter that is on the Hub, with its undo file, into a base of several shards."""
    hub.create(BASE)
    loratool.base_add("tiny", tiny_models.folder("llama", "bf16", "sharded"), hub_id=BASE)
    loratool.add(tiny_adapters.folder("llama"), name="pirate", base="tiny")
    loratool.push("pirate", "ada/pirate")
    return loratool.merge([("pirate", 0.5)], into="tiny", out=tmp_path / "merged", undo=True).out


def files(hub: HubStandIn, repository: str) -> dict[str, bytes]:
    return {path: blob.data for path, blob in hub.repositories[repository].head.files.items()}


def test_what_is_pushed_loads_verifies_and_unmerges(hub: HubStandIn, merged: Path, tmp_path: Path) -> None:
    (merged / "notes.txt").write_text("mine")
    result = loratool.push(merged, "ada/merged", merged=True)
    folder = Path(snapshot_download("ada/merged", local_dir=tmp_path / "copy"))
    inputs = torch.arange(8)[None]
    assert torch.equal(load(folder, "llama")(inputs).logits, load(merged, "llama")(inputs).logits)
    assert loratool.verify(folder).replayed == "base"
    loratool.unmerge(folder, out=tmp_path / "back")
    assert loratool.base_add("back", tmp_path / "back").fingerprint == loratool.base_show("tiny").record.fingerprint

    card = ModelCard(result.card)
    facts = card.data.to_dict()
    assert (facts["base_model"], facts["base_model_relation"], facts["library_name"]) == (BASE, "merge", "transformers")
    assert f"({hub.endpoint}/ada/pirate)" in card.text and "weight 0.5" in card.text
    pushed = files(hub, "ada/merged")
    assert not any(str(tmp_path).encode() in data or b"pytest-of" in data for data in pushed.values())
    assert not [path for path in pushed if "undo" in path or path == "notes.txt"]
    assert any(note.startswith("the undo file stays here") for note in result.notes)
    assert "'notes.txt' does not belong to the model and stays here; --file sends one, --all-files all" in result.notes
    assert len(hub.repositories["ada/merged"].history) == 2
    assert not loratool.push(merged, "ada/merged", merged=True).sent


def test_files_that_were_added_are_sent_when_they_are_named(hub: HubStandIn, merged: Path, tmp_path: Path) -> None:
    for name in ("notes.txt", "evaluation/loss.json", "evaluation/plot.svg", "optimizer.pt"):
        (merged / name).parent.mkdir(exist_ok=True)
        (merged / name).write_text("mine")
    (merged / "generation_config.json").write_text('{"temperature": 0.5}')
    loratool.push(merged, "ada/merged", merged=True, files=["notes.txt"])
    assert {"notes.txt"} <= files(hub, "ada/merged").keys()
    assert not {"evaluation/loss.json", "optimizer.pt"} & files(hub, "ada/merged").keys()
    loratool.push(merged, "ada/merged", merged=True, files=[merged / "notes.txt", "evaluation"])
    assert {"evaluation/loss.json", "evaluation/plot.svg"} <= files(hub, "ada/merged").keys()
    result = loratool.push(merged, "ada/everything", merged=True, all_files=True)
    assert {"notes.txt", "evaluation/loss.json", "optimizer.pt"} <= files(hub, "ada/everything").keys()
    assert not any("--all-files" in note for note in result.notes)
    for repository in ("merged", "everything"):
        folder = Path(snapshot_download(f"ada/{repository}", local_dir=tmp_path / f"copy-{repository}"))
        verified = loratool.verify(folder)  # what was edited, and what was added, is in the record that went along
        assert (verified.replayed, verified.edited) == ("base", ())
        assert not any("undo" in path for path in files(hub, f"ada/{repository}"))


def test_what_must_not_go_along_does_not(
    hub: HubStandIn, merged: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="no file 'nowhere'"):
        loratool.push(merged, "ada/x", merged=True, files=["nowhere"])
    undo = next(path for path in merged.rglob("*") if path.name == "undo.st")
    for name in (undo.relative_to(merged), "loratool-undo", tmp_path / "merged" / "loratool.json"):
        with pytest.raises((HubError, NotFoundError)):
            loratool.push(merged, "ada/x", merged=True, files=[name])
    (merged / "adapter_config.json").write_text("{}")
    with pytest.raises(HubError, match="on top of the model"):
        loratool.push(merged, "ada/x", merged=True, files=["adapter_config.json"])
    sent = loratool.push(merged, "ada/x", merged=True, all_files=True)
    assert "adapter_config.json" not in files(hub, "ada/x")
    assert any(note.startswith("'adapter_config.json' stays here") for note in sent.notes)
    (tmp_path / "secret").write_text("s3cret")
    (merged / "notes.txt").symlink_to(tmp_path / "secret")
    for options in ({"files": ["notes.txt"]}, {"all_files": True}):
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            loratool.push(merged, "ada/y", merged=True, **options)
    assert not any(b"s3cret" in data for data in files(hub, "ada/x").values())
    with pytest.raises(LoratoolError, match="--merged"):
        loratool.push("pirate", "ada/pirate", all_files=True)


def test_the_undo_of_an_earlier_merge_stays_too(
    hub: HubStandIn, merged: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    twice = loratool.merge([tiny_adapters.folder("llama", seed=5)], into=merged, out=tmp_path / "twice", undo=True).out
    loratool.push(twice, "ada/twice", merged=True, base_model="ada/merged")
    assert not any("undo" in path for path in files(hub, "ada/twice"))
    assert loratool.verify(Path(snapshot_download("ada/twice", local_dir=tmp_path / "copy"))).tensors


def test_a_private_adapter_is_named_and_not_linked(hub: HubStandIn, merged: Path) -> None:
    hub.repositories["ada/pirate"].private = True
    card = loratool.push(merged, "ada/merged", merged=True, dry_run=True).card
    assert "ada/pirate" not in card and "`pirate`" in card


def test_an_interrupted_push_goes_on_where_it_was(hub: HubStandIn, merged: Path) -> None:
    shards = len(list(merged.glob("*.safetensors")))
    hub.faults.append(Failure("PUT", "/objects/", status=403, message="Expired"))
    with pytest.raises(HubError, match="Expired"):
        loratool.push(merged, "ada/merged", merged=True)
    repository = hub.repositories["ada/merged"]
    assert len(repository.history) == 1
    # Uploads that were under way beside the one that failed are done.
    missing = shards - len(repository.objects)
    assert 1 <= missing < shards
    before = hub.count("PUT", "/objects/")
    hub.faults.append(Cut("PUT", "/objects/"))
    loratool.push(merged, "ada/merged", merged=True)
    assert hub.count("PUT", "/objects/") - before == missing + 1
    assert len(repository.history) == 2


def test_what_loads_in_place_of_the_model_or_on_top_of_it_is_refused(hub: HubStandIn, merged: Path) -> None:
    with pytest.raises(HubError, match=r"holds 'adapter_config.json' .* on top; .* another repository"):
        loratool.push(merged, "ada/pirate", merged=True)
    whole = hub.create("ada/whole")
    whole.put({"config.json": b"{}", "model.safetensors": b"of before"})
    with pytest.raises(HubError, match=r"holds 'model.safetensors' .* in its place"):
        loratool.push(merged, "ada/whole", merged=True)
    with pytest.raises(HubError, match="whole model"):
        loratool.push("pirate", "ada/whole")
    assert len(whole.history) == 2
    loratool.push(merged, "ada/merged", merged=True)
    with pytest.raises(HubError, match="whole model"):
        loratool.push("pirate", "ada/merged", dry_run=True)


def test_a_merge_of_a_merge_names_no_folder(
    hub: HubStandIn, merged: Path, tiny_adapters: TinyAdapters, tmp_path: Path
) -> None:
    twice = loratool.merge([tiny_adapters.folder("llama", seed=5)], into=merged, out=tmp_path / "twice").out
    with pytest.raises(HubError, match="--base-model"):
        loratool.push(twice, "ada/twice", merged=True)
    loratool.push(twice, "ada/twice", merged=True, base_model="ada/merged")
    folder = Path(snapshot_download("ada/twice", local_dir=tmp_path / "copy"))
    loratool.base_add("merged", merged)
    loratool.unmerge(folder, out=tmp_path / "once")
    assert str(tmp_path) not in (tmp_path / "once" / "loratool.json").read_text()
    assert loratool.verify(tmp_path / "once").tensors


def test_a_quantized_model(hub: HubStandIn, tiny_models: TinyModels, tmp_path: Path) -> None:
    hub.create(BASE)
    loratool.base_add("tiny", tiny_models.folder("llama", "bf16"), hub_id=BASE)
    loratool.quantize("tiny", out=tmp_path / "nf4")
    result = loratool.push("tiny-nf4", "ada/nf4", merged=True)
    card = ModelCard(result.card)
    assert card.data.base_model_relation == "quantized" and card.data.base_model == BASE
    assert set(card.data.tags) == {"loratool", "4-bit", "bitsandbytes"}
    assert json.loads(files(hub, "ada/nf4")["loratool.json"])["base"]["path"] == BASE


def test_what_is_no_merged_model_is_refused(
    hub: HubStandIn, merged: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="did not merge it"):
        loratool.push(tiny_models.folder("llama", "fp32"), "ada/x", merged=True)
    shard = sorted(merged.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError, match="differs from its manifest"):
        loratool.push(merged, "ada/x", merged=True)
    data[-1] ^= 1
    shard.write_bytes(data)
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    (merged / "config.json").unlink()
    (merged / "config.json").symlink_to(secret)
    with pytest.raises((CheckpointError, HubError)):
        loratool.push(merged, "ada/x", merged=True)
    assert "ada/x" not in hub.repositories
