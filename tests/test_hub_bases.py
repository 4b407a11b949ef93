"""Bases from the Hub: catalogued by their headers, downloaded and checked when a merge needs their weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from hub_adapters import files_of, publish
from hub_stand_in import Corruption, HubStandIn, Repository
from hub_stand_in.repositories import Blob
from tiny_adapters import TinyAdapters, copy_with, save_plain_adapter
from tiny_models import TinyModels, assert_same_tensors, stored_tensors

import loratool
from loratool.cli import cli
from loratool.errors import CheckpointError, HubError, NotFoundError, OutputError, VerificationError, WrongBaseError
from loratool.hub.bases import HeaderCache
from loratool.hub.repository import HubFile
from registry import Registry

REPO = "org/llama"


@pytest.fixture(autouse=True)
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.hub.retry.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def llama(tiny_models: TinyModels) -> Path:
    return tiny_models.folder("llama", "bf16", "sharded")


@pytest.fixture
def pirate(tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    """An adapter of the base, which names it by its Hub id."""
    return copy_with(tiny_adapters.folder("llama"), tmp_path / "pirate", base_model_name_or_path=REPO)


@pytest.fixture
def on_hub(hub: HubStandIn, llama: Path) -> Repository:
    repository = hub.create(REPO)
    repository.put(files_of(llama) | {"pytorch_model.bin": b"no", "onnx/model.safetensors": b"no"})
    return repository


def weights_asked(hub: HubStandIn) -> int:
    """How many times the content of a weight file was asked for, ranges included."""
    return sum(request.method == "GET" and ".safetensors" in request.path and "index" not in request.path
               for request in hub.asked if not request.storage)  # fmt: skip


def cached_weights() -> list[Path]:
    from huggingface_hub import constants

    return sorted(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def test_a_base_is_catalogued_by_its_headers_alone(hub: HubStandIn, on_hub: Repository, llama: Path) -> None:
    record = loratool.base_add("llama", REPO)
    local = loratool.base_add("local", llama)
    assert (record.path, record.fingerprint, record.source) == (None, None, REPO)
    assert record.revision == on_hub.head.oid
    for fact in ("parameter_count", "size_bytes", "dtype", "architecture", "model_type"):
        assert getattr(record, fact) == getattr(local, fact)
    shards = [name for name in files_of(llama) if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert record.files == {
        name: {"size": len(blob.data), "sha256": blob.sha256}
        for name, blob in on_hub.head.files.items() if name in shards
    }  # fmt: skip
    assert cached_weights() == []
    assert weights_asked(hub) == len(shards)


def test_it_is_shown_as_not_downloaded(on_hub: Repository) -> None:
    added = run("base", "add", "llama", REPO)
    assert "not downloaded" in added.stdout
    assert "not downloaded" in run("base", "list").stdout
    assert "not downloaded" in run("base", "show", "llama").stdout
    assert json.loads(run("base", "show", "llama", "--json").stdout)["downloaded"] is False
    with pytest.raises(VerificationError, match="loratool base add llama org/llama --download"):
        loratool.base_verify("llama")
    assert "not downloaded" not in run("base", "add", "llama", REPO, "--download").stdout
    assert json.loads(run("base", "list", "--json").stdout)[0]["downloaded"] is True
    loratool.base_verify("llama")


def test_a_dry_run_needs_the_headers_only(
    hub: HubStandIn, on_hub: Repository, llama: Path, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratool.base_add("llama", REPO)
    expected = loratool.merge([pirate], into=llama, out=tmp_path / "out", dry_run=True)
    hub.asked.clear()
    planned = loratool.merge([pirate], into="llama", out=tmp_path / "out", dry_run=True)
    assert hub.asked == []
    assert [(t.name, t.weight.shape, t.nbytes) for t in planned.plan.targets] == [
        (t.name, t.weight.shape, t.nbytes) for t in expected.plan.targets
    ]
    assert planned.output_size_bytes == expected.output_size_bytes
    assert any("not downloaded" in note for note in planned.notes)
    assert loratool.quantize("llama", out=tmp_path / "nf4", dry_run=True).plan.layout.nbytes > 0
    direct = loratool.merge([pirate], into=REPO, out=tmp_path / "out", dry_run=True)
    assert len(direct.plan.targets) == len(expected.plan.targets)
    assert cached_weights() == []
    assert loratool.base_list()[0].path is None


def test_a_merge_downloads_checks_and_fingerprints_it_once(
    hub: HubStandIn, on_hub: Repository, llama: Path, pirate: Path, tmp_path: Path
) -> None:
    loratool.base_add("llama", REPO)
    added = loratool.add(pirate)
    assert (added.record.base, added.record.base_fingerprint) == ("llama", None)
    merged = loratool.merge("pirate", into="llama", out=tmp_path / "merged")
    expected = loratool.merge([pirate], into=llama, out=tmp_path / "expected")
    assert_same_tensors(stored_tensors(merged.out), stored_tensors(expected.out))
    record = loratool.base_list()[0]
    assert record.fingerprint == expected.base_fingerprint
    assert record.path is not None and record.path.name == on_hub.head.oid
    assert loratool.show("pirate").record.base_fingerprint == record.fingerprint
    assert not [path for path in cached_weights() if path.parent.name == "onnx"]
    hub.asked.clear()
    loratool.merge("pirate", into="llama", out=tmp_path / "again")
    loratool.base_verify("llama")
    assert hub.asked == []


def test_a_base_that_left_the_cache_is_got_again(
    hub: HubStandIn, on_hub: Repository, pirate: Path, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    before = loratool.base_add("llama", REPO, download=True)
    on_hub.put({"README.md": b"# Newer"})
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert "not downloaded" in run("base", "list").stdout
    assert loratool.doctor().findings == ()
    loratool.merge([pirate], into="llama", out=tmp_path / "merged")
    assert loratool.base_list()[0] == before


def test_weights_that_are_not_what_was_catalogued_are_refused(
    hub: HubStandIn, on_hub: Repository, pirate: Path, tmp_path: Path
) -> None:
    loratool.base_add("llama", REPO)
    hub.faults.append(Corruption("GET", "/objects/", times=1000))
    with pytest.raises(HubError, match=r"two downloads.*sha256"):
        loratool.merge([pirate], into="llama", out=tmp_path / "merged")
    hub.faults.clear()
    name = next(iter(loratool.base_list()[0].files or {}))
    on_hub.head.files[name] = Blob(on_hub.head.files[name].data[:-1] + b"!", lfs=True)  # type: ignore[index]
    with pytest.raises(HubError, match="has changed since base"):
        loratool.merge([pirate], into="llama", out=tmp_path / "merged")
    assert (loratool.base_list()[0].path, loratool.base_list()[0].fingerprint) == (None, None)
    assert not (tmp_path / "merged").exists()


def test_a_download_that_was_damaged_once_is_got_once_more(hub: HubStandIn, on_hub: Repository, llama: Path) -> None:
    hub.faults.append(Corruption("GET", "/objects/"))
    record = loratool.base_add("llama", REPO, download=True)
    assert record.fingerprint == loratool.base_add("local", llama).fingerprint


def test_a_pulled_adapter_is_tied_to_a_base_by_its_id_and_its_shapes(
    hub: HubStandIn, on_hub: Repository, pirate: Path, tmp_path: Path
) -> None:
    publish(hub, "ada/pirate", pirate)
    alone = loratool.pull("ada/pirate")
    assert alone.record.base is None
    assert f"loratool base add llama {REPO}" in alone.notes[-1]
    loratool.base_add("llama", REPO)
    assert loratool.pull("ada/pirate").record.base == "llama"
    publish(hub, "ada/unfit", save_plain_adapter(tmp_path / "unfit", {"model.layers.0.self_attn.q_proj": (7, 9)}),
            base_model=REPO)  # fmt: skip
    assert loratool.pull("ada/unfit").record.base is None
    with pytest.raises(loratool.LoratoolError, match="q_proj"):
        loratool.pull("ada/unfit", base="llama")


def test_a_fingerprint_that_an_adapter_records_falsely_ties_it_to_nothing(
    hub: HubStandIn, llama: Path, tmp_path: Path
) -> None:
    base = loratool.base_add("llama", llama)
    unfit = save_plain_adapter(tmp_path / "unfit", {"model.layers.0.self_attn.q_proj": (7, 9)})
    publish(hub, "eve/unfit", unfit, facts={"schema": 1, "kind": "lora", "base_fingerprint": base.fingerprint})
    with pytest.raises(WrongBaseError, match=r"records 'llama' as its base but does not land on it \(.*q_proj"):
        loratool.pull("eve/unfit")
    assert loratool.list() == ()


def test_offline_what_is_here_works_and_the_rest_says_what_to_run(
    hub: HubStandIn, on_hub: Repository, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loratool.base_add("llama", REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert loratool.merge([pirate], into="llama", out=tmp_path / "out", dry_run=True).plan.targets
    with pytest.raises(NotFoundError, match="loratool base add llama org/llama --download"):
        loratool.merge([pirate], into="llama", out=tmp_path / "out")
    with pytest.raises(NotFoundError, match="loratool base add other org/other"):
        loratool.base_add("other", "org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    loratool.merge([pirate], into=REPO, out=tmp_path / "one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    loratool.merge([pirate], into=REPO, out=tmp_path / "two")
    loratool.merge([pirate], into="llama", out=tmp_path / "three")
    assert hub.asked == []


def test_adding_it_again_is_the_same_base_at_the_same_commit(hub: HubStandIn, on_hub: Repository) -> None:
    first = loratool.base_add("llama", REPO)
    on_hub.put({"config.json": b"{}"})
    assert loratool.base_add("llama", REPO) == first
    downloaded = loratool.base_add("llama", REPO, download=True)
    assert (downloaded.revision, downloaded.id) == (first.revision, first.id)
    assert downloaded.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "is a pickle"),
        ({"config.json": b"{}"}, "no safetensors weights"),
        ({"model.safetensors": b"x" * 64}, "header claims"),
        ({"model.safetensors": b"\x02\0\0\0\0\0\0\0{}extra"}, "tensors end at byte"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../a.safetensors"}}'},
            "not a safetensors file in its own",
        ),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "a.safetensors"}}'}, "which is not in the repository"),
    ],
)
def test_what_is_no_model_is_refused(files: dict[str, bytes], message: str, hub: HubStandIn) -> None:
    hub.create("org/it").put(files)
    with pytest.raises(CheckpointError, match=message):
        loratool.base_add("it", "org/it")
    assert loratool.base_list() == ()


@pytest.mark.parametrize("source", ["org/none", f"{REPO}@nowhere", "org/gated"])
def test_missing_and_gated_repositories_say_what_to_do(source: str, hub: HubStandIn, on_hub: Repository) -> None:
    hub.create("org/gated", gated="manual").put({"model.safetensors": b"x", "config.json": b"{}"})
    with pytest.raises((NotFoundError, HubError)) as raised:
        loratool.base_add("it", source)
    assert str(raised.value).isprintable()
    assert any(word in str(raised.value) for word in ("check", "ask for access"))


def test_an_adapter_may_be_a_hub_id(hub: HubStandIn, llama: Path, pirate: Path, tmp_path: Path) -> None:
    commit = publish(hub, "ada/pirate", pirate).head.oid
    merged = loratool.merge(["ada/pirate"], into=llama, out=tmp_path / "merged")
    assert [each.adapter for each in merged.adapters] == [f"ada/pirate@{commit[:12]}"]
    expected = loratool.merge([pirate], into=llama, out=tmp_path / "expected")
    assert_same_tensors(stored_tensors(merged.out), stored_tensors(expected.out))
    assert loratool.list() == ()
    loratool.pull("ada/pirate")
    hub.asked.clear()
    again = loratool.merge([f"ada/pirate@{commit}"], into=llama, out=tmp_path / "again")
    assert [each.adapter for each in again.adapters] == ["pirate@1"]
    assert hub.asked == []
    with pytest.raises(NotFoundError, match="neither a catalogued name nor a path, and as a Hub id"):
        loratool.merge(["ada/nothing"], into=llama, out=tmp_path / "nothing")


def test_a_merge_is_taken_out_with_a_base_that_is_downloaded_again(
    hub: HubStandIn, on_hub: Repository, llama: Path, pirate: Path, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    loratool.base_add("llama", REPO)
    merged = loratool.merge([pirate], into="llama", out=tmp_path / "merged").out
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.asked.clear()
    loratool.verify(merged)
    assert hub.asked == []
    back = loratool.unmerge(merged, out=tmp_path / "back").out
    assert_same_tensors(stored_tensors(back), stored_tensors(llama))


def test_a_base_on_the_hub_is_not_downloaded_to_be_refused(hub: HubStandIn, on_hub: Repository, pirate: Path) -> None:
    loratool.base_add("llama", REPO)
    for into in ("llama", REPO):
        with pytest.raises(OutputError, match="--out"):
            loratool.merge([pirate], into=into, in_place=True)
    assert cached_weights() == []


def test_an_adapter_is_no_base(hub: HubStandIn, pirate: Path) -> None:
    publish(hub, "ada/pirate", pirate)
    with pytest.raises(CheckpointError, match="loratool pull ada/pirate"):
        loratool.base_add("it", "ada/pirate")


def test_the_default_outputs_of_what_is_on_the_hub_lie_in_the_working_folder(
    hub: HubStandIn, on_hub: Repository, pirate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, "ada/pirate", pirate)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    loratool.base_add("llama", REPO)
    planned = loratool.merge(["ada/pirate"], into="llama", dry_run=True).out
    assert (planned, loratool.merge(["ada/pirate"], into="llama").out) == (work / "llama-pirate", work / "llama-pirate")
    assert loratool.truncate("ada/pirate", rank=2)[0].out.absolute() == work / "pirate-r2.safetensors"


def test_a_home_that_cannot_be_written_still_merges_a_dry_run(
    hub: HubStandIn, on_hub: Repository, pirate: Path
) -> None:
    planned = loratool.merge([pirate], into=REPO, dry_run=True)
    assert planned.plan.targets


def test_the_base_of_an_evaluation_is_recorded_although_the_catalogue_is_only_read(
    hub: HubStandIn, on_hub: Repository, home_of_its_own: Path
) -> None:
    from loratool.library.resolving.resolve import resolve_base

    loratool.base_add("llama", REPO)
    with Registry.open(home_of_its_own, read_only=True) as catalogue:
        found = resolve_base("llama", catalogue)
    assert found.path.is_dir()
    assert loratool.base_list()[0].fingerprint


def test_a_plan_for_a_base_in_4_bits_needs_its_weights(
    hub: HubStandIn, llama: Path, pirate: Path, tmp_path: Path
) -> None:
    loratool.base_add("llama", llama)
    nf4 = loratool.quantize("llama", out=tmp_path / "nf4").out
    hub.create("org/nf4").put(files_of(nf4))
    loratool.base_add("four", "org/nf4")
    with pytest.raises(CheckpointError, match="loratool base add NAME org/nf4 --download"):
        loratool.merge([pirate], into="four", out=tmp_path / "merged", dry_run=True)
    loratool.base_add("four", "org/nf4", download=True)
    planned = loratool.merge([pirate], into="four", out=tmp_path / "merged", dry_run=True, any_base=True)
    assert planned.plan.targets


def test_a_pipe_in_the_cache_of_headers_is_no_header(tmp_path: Path) -> None:
    cache, file = HeaderCache(tmp_path), HubFile("model.safetensors", 8, "a" * 64, None)
    cache.put(file, b"{}")
    assert cache.get(file) == b"{}"
    (entry,) = tmp_path.iterdir()
    entry.unlink()
    os.mkfifo(entry)
    assert cache.get(file) is None
