"""The content store: what goes in comes out, whole or not at all, through no link, and nothing in use is freed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
from catalogued import digest, facts, without_privileges
from hypothesis import given
from hypothesis import strategies as st

from registry import NotSureError, Registry, RegistryError
from registry.store import Store, entry_key

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything_in(store: Store) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file()]


def test_what_is_put_in_comes_out_under_the_hash_of_its_listing(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "weights.st"
    source.write_bytes(os.urandom(3_000_001))
    weights = hashlib.sha256(source.read_bytes()).hexdigest()
    key = store.put({"adapter_model.safetensors": source, "b.json": b"{}"}, {"adapter_model.safetensors": weights})
    listing = f"{weights}  adapter_model.safetensors\n{hashlib.sha256(b'{}').hexdigest()}  b.json\n"
    assert key == hashlib.sha256(listing.encode()).hexdigest()
    assert store.path(key) == store.root / key[:2] / key
    assert content(store.path(key)) == {"adapter_model.safetensors": source.read_bytes(), "b.json": b"{}"}
    assert list(store.entries()) == [key]
    assert store.is_whole(key)
    assert list((store.root / "tmp").iterdir()) == []


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True), st.binary(max_size=64), min_size=1))
def test_entries_differ_exactly_when_their_files_do(files: dict[str, bytes]) -> None:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert entry_key(digests) == entry_key(dict(reversed(digests.items())))
    name = min(digests)
    assert entry_key(digests) != entry_key({**digests, name: digest("other")})
    assert entry_key(digests) != entry_key({**digests, name + "x": digest("other")})


def test_the_same_files_twice_are_one_entry(store: Store) -> None:
    assert store.put(FILES) == store.put(dict(reversed(FILES.items())))
    assert len(list(store.entries())) == 1
    assert list((store.root / "tmp").iterdir()) == []


def test_another_config_beside_the_same_weights_is_another_entry(store: Store) -> None:
    one, other = store.put(FILES), store.put({**FILES, "adapter_config.json": b'{"lora_alpha": 32}'})
    assert one != other
    assert content(store.path(one)) == FILES


def test_a_file_with_another_digest_than_expected_is_refused_and_leaves_nothing(store: Store) -> None:
    for expected in ({"adapter_model.safetensors": digest("x")}, {"absent": digest("x")}):
        with pytest.raises(RegistryError, match="expected"):
            store.put(FILES, expected)
    assert everything_in(store) == []
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/x", ".hidden", "a\nb", "a\x00b", "x" * 300, "C:x", "a\udcff"],
)
def test_a_name_that_leads_elsewhere_is_refused(store: Store, name: str) -> None:
    with pytest.raises(RegistryError) as raised:
        store.put({name: b""})
    assert str(raised.value).isprintable()
    assert not store.root.exists()


def test_links_are_read_and_never_written_through(store: Store, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "snapshot").symlink_to(tmp_path / "blob")
    key = store.put({"adapter_model.safetensors": tmp_path / "snapshot"})
    assert not (store.path(key) / "adapter_model.safetensors").is_symlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    for link in (
        store.root / "tmp",
        store.root / entry_key({"a": hashlib.sha256(b"a").hexdigest()})[:2],
        store.root,
    ):
        if link.exists():
            shutil.rmtree(link)
        link.symlink_to(outside)
        with pytest.raises(RegistryError, match="writes through neither"):
            store.put({"a": b"a"})
        link.unlink()
    assert list(outside.iterdir()) == []


def test_a_source_that_is_no_file_is_refused_without_waiting_for_it(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", tmp_path, tmp_path / "absent", Path("/dev/null")):
        with pytest.raises(RegistryError) as raised:
            store.put({"a": source})
        assert str(source) in str(raised.value)
    assert everything_in(store) == []


def test_an_entry_that_lost_a_file_is_put_right_by_the_next_who_brings_it(store: Store) -> None:
    key = store.put(FILES)
    (store.path(key) / "adapter_config.json").unlink()
    assert not store.is_whole(key)
    assert store.put(FILES) == key
    assert content(store.path(key)) == FILES


def test_a_full_disk_leaves_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryError, match="is full"):
        store.put(FILES)
    assert everything_in(store) == []


def test_a_store_that_cannot_be_written_is_an_error_of_one_sentence(open_home: Path) -> None:
    open_home.mkdir()
    with without_privileges(), pytest.raises(RegistryError, match="LORATOOL_HOME"):
        Store(open_home / "store").put(FILES)


def test_a_key_that_is_none_leads_nowhere(store: Store) -> None:
    for key in ("", "../" + "0" * 61, "0" * 63, "G" * 64):
        with pytest.raises(RegistryError):
            store.path(key)


def test_what_is_staged_and_given_up_leaves_nothing(store: Store) -> None:
    with store.stage(FILES):
        pass
    with pytest.raises(ValueError, match="stop"), store.stage(FILES):
        raise ValueError("stop")
    assert everything_in(store) == []


def test_removing_an_adapter_frees_its_files_unless_another_names_them(catalogue: Registry) -> None:
    for name in ("one", "two"):
        with catalogue.store.stage(FILES) as staged:
            catalogue.adapters.add(name, facts(), staged=staged)
    with catalogue.store.stage({"x": b"x"}) as staged:
        catalogue.adapters.add("three", facts("x"), staged=staged)
    assert len(list(catalogue.store.entries())) == 2
    catalogue.adapters.remove("one", now=True)
    assert catalogue.adapters.files(catalogue.adapters.find("two")).is_dir()
    catalogue.adapters.remove("two", now=True)
    assert list(catalogue.store.entries()) == [staged.key]


def test_a_removal_that_is_rolled_back_keeps_the_files(catalogue: Registry) -> None:
    with catalogue.store.stage(FILES) as staged:
        catalogue.adapters.add("one", facts(), staged=staged)
    with pytest.raises(ValueError, match="stop"), catalogue.writing():
        catalogue.adapters.remove("one")
        raise ValueError("stop")
    assert content(catalogue.adapters.files(catalogue.adapters.find("one"))) == FILES


def test_adding_an_adapter_again_brings_back_files_that_were_lost(catalogue: Registry) -> None:
    with catalogue.store.stage(FILES) as staged:
        first, _ = catalogue.adapters.add("one", facts(), staged=staged)
    shutil.rmtree(catalogue.adapters.files(first))
    with catalogue.store.stage({**FILES, "README.md": b"new"}) as staged:
        again, new = catalogue.adapters.add("one", facts(), staged=staged)
    assert not new
    assert content(catalogue.adapters.files(again)) == {**FILES, "README.md": b"new"}
    assert len(again.locations) == 1
    assert catalogue.doctor.examine(deep=True) == ()


def test_an_add_that_fails_leaves_no_row_and_gc_frees_its_files(catalogue: Registry) -> None:
    with (
        pytest.raises(ValueError, match="stop"),
        catalogue.store.stage(FILES) as staged,
        catalogue.writing(),
    ):
        catalogue.adapters.add("one", facts(), staged=staged)
        raise ValueError("stop")
    assert catalogue.adapters.list() == ()
    (orphan,) = catalogue.doctor.examine()
    assert (orphan.kind, orphan.subject, orphan.size_bytes) == ("store-orphan", staged.key, 9)
    with pytest.raises(NotSureError, match="most of the store"):
        catalogue.doctor.collect()
    freed = catalogue.doctor.collect(sure=True)
    assert (freed.entries, freed.size_bytes) == (1, 9)
    assert catalogue.doctor.examine() == ()


def test_gc_keeps_what_is_being_staged_and_clears_what_was_abandoned(catalogue: Registry) -> None:
    old, young = catalogue.store.stage(FILES), catalogue.store.stage(FILES)
    long_ago = time.time() - 25 * 3600
    os.utime(old.folder, (long_ago, long_ago))
    assert [finding.subject for finding in catalogue.doctor.examine()] == [old.folder.name]
    assert catalogue.doctor.collect().entries == 1
    assert not old.folder.exists()
    assert catalogue.adapters.add("one", facts(), staged=young)[1]
    assert catalogue.doctor.examine(deep=True) == ()
