"""JSON from outside costs no more than its kind can need, however it was made, and a bad one is a clear error everywhere."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loratool
from loratool.checkpoint.json_text import DEEPEST, parse_json, read_json_object
from loratool.errors import CheckpointError, LoratoolError, quoted
from registry import AdapterFacts, Registry, RegistryError
from registry.json_text import LARGEST_JSON, json_text, json_value

if TYPE_CHECKING:
    from tiny_adapters import TinyAdapters
    from tiny_models import TinyModels

PEAK = 240_000_000
"""Bytes that a command may take to refuse a file of any size: twice what may be read of a list of tensors."""

DEEP = "[" * 900 + "]" * 900


@pytest.fixture
def work(tiny_models: TinyModels, tiny_adapters: TinyAdapters, tmp_path: Path) -> Path:
    """A base of several shards, an adapter for it as a folder and as one file, and their merge."""
    shutil.copytree(tiny_models.folder("llama", "fp32", "sharded"), tmp_path / "base")
    shutil.copytree(tiny_adapters.folder("llama"), tmp_path / "adapter")
    loratool.merge(tmp_path / "adapter", into=tmp_path / "base", out=tmp_path / "merged")
    return tmp_path


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "an adapter's configuration": ("adapter/adapter_config.json", lambda work: loratool.add(work / "adapter")),
    "what loratool records beside it": ("adapter/loratool.json", lambda work: loratool.add(work / "adapter")),
    "a base's configuration": (
        "base/config.json",
        lambda work: loratool.merge(work / "adapter", into=work / "base", out=work / "out"),
    ),
    "a base's index": ("base/model.safetensors.index.json", lambda work: loratool.base_add("base", work / "base")),
    "a manifest": ("merged/loratool.json", lambda work: loratool.verify(work / "merged")),
    "a manifest that would be replaced": (
        "merged/loratool.json",
        lambda work: loratool.merge(work / "adapter", into=work / "base", out=work / "merged", force=True),
    ),
    "a configuration to estimate by": ("base/config.json", lambda work: loratool.estimate(str(work / "base"))),
}


def expect_clear(command: Callable[[], object]) -> str:
    """The command fails with one short sentence, and takes little memory to do so."""
    tracemalloc.start()
    try:
        with pytest.raises((LoratoolError, RegistryError)) as raised:
            command()
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()
    message = str(raised.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 700
    return message


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_half_a_gigabyte_is_refused_before_it_is_read_whole(reader: str, work: Path) -> None:
    name, command = READERS[reader]
    with open(work / name, "wb") as stream:
        os.truncate(stream.fileno(), 500_000_000)
    message = expect_clear(lambda: command(work))
    assert ("did not write" if "replaced" in reader else "500,000,000 bytes") in message


@pytest.mark.parametrize("text", [f'{{"a": {DEEP}}}', '{"a": 1e999}', '{"a": -1e999}', f'{{"a": {"9" * 400}}}'])
@pytest.mark.parametrize("reader", READERS)
def test_nesting_and_numbers_beyond_all_sense_are_a_clear_error(reader: str, text: str, work: Path) -> None:
    name, command = READERS[reader]
    (work / name).write_text(text)
    message = expect_clear(lambda: command(work))
    assert "unexpected" not in message
    if "replaced" not in reader:
        assert "nested" in message or "largest double" in message


@pytest.mark.parametrize("key", ["adapter_config", "loratool"])
@pytest.mark.parametrize("value", [DEEP, f'{{"a": {DEEP}}}', '{"a": 1e999}'])
def test_a_files_metadata_is_read_within_the_same_bounds(key: str, value: str, work: Path) -> None:
    config = (work / "adapter" / "adapter_config.json").read_text()
    tensors = load_file(work / "adapter" / "adapter_model.safetensors")
    save_file(tensors, work / "one.safetensors", {"adapter_config": config} | {key: value})
    assert repr(key) in expect_clear(lambda: loratool.add(work / "one.safetensors"))


def test_a_byte_order_mark_says_nothing(work: Path) -> None:
    config = work / "adapter" / "adapter_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    record = loratool.add(work / "adapter").record
    assert (record.kind, record.rank, record.alpha) == ("lora", 4, 8)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\u00e9", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN)
def test_what_is_within_bounds_is_read_as_json_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text.encode()) == json.loads(text)
    assert json_value(json_text(value)) == value


@given(st.binary(max_size=60))
def test_bytes_of_any_kind_are_json_or_a_value_error(text: bytes) -> None:
    try:
        parse_json(text)
    except ValueError as error:
        assert str(error).isprintable()


def test_the_deepest_that_is_read_is_the_limit() -> None:
    assert parse_json(b"[" * DEEPEST + b"]" * DEEPEST)
    with pytest.raises(ValueError, match="nested"):
        parse_json(b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1))


def test_a_link_to_a_device_or_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_json_object(tmp_path / name)


def test_what_is_quoted_is_never_shown_whole_however_deep_or_long_it_is() -> None:
    deep: list[Any] = []
    for _ in range(5_000):
        deep = [deep]
    assert len(quoted(deep)) < 130
    assert len(quoted({"a": [0] * 10_000_000})) < 130


# What the catalogue keeps.


@pytest.fixture
def catalogue(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "home")


def facts(**more: Any) -> AdapterFacts:
    return AdapterFacts(kind="lora", sha256="0" * 64, size_bytes=1, **more)


@pytest.mark.parametrize("column", ["config", "recipe", "metrics"])
@pytest.mark.parametrize(
    "value", [{"a": "x" * (LARGEST_JSON + 1)}, {"a": json.loads(DEEP)}], ids=["17 million letters", "900 levels"]
)
def test_a_configuration_beyond_bounds_is_not_catalogued(column: str, value: Any, catalogue: Registry) -> None:
    with pytest.raises(RegistryError, match=r"nested|16,777,216|characters"):
        catalogue.adapters.add("pirate", facts(**{column: value}))
    assert catalogue.adapters.versions("pirate") == ()


def test_a_row_beyond_bounds_is_a_damaged_row(catalogue: Registry, tmp_path: Path) -> None:
    import sqlite3

    catalogue.adapters.add("pirate", facts(target_modules=["q_proj"]))
    with sqlite3.connect(tmp_path / "home" / "registry.db") as connection:
        connection.execute("UPDATE adapters SET target_modules = ?", (DEEP,))
    with pytest.raises(RegistryError, match="damaged"):
        catalogue.adapters.find("pirate")
    assert catalogue.adapters.list() == ()
