"""Headers and indexes from outside: what safetensors itself reads is read alike, anything else is a clear refusal."""

from __future__ import annotations

import json
import math
import os
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.checkpoint.dtypes import DTYPES
from loratool.checkpoint.header import Header, header_bytes, parse_json_object, read_header
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, LoratoolError, NotFoundError

FUZZ = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

TENSORS: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
}
DATA = bytes(range(32))


def safetensors_bytes(header: str | bytes, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A file with this header and data; `length` is what its first eight bytes claim."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


VALID = safetensors_bytes(json.dumps({"__metadata__": {"format": "pt"}} | TENSORS))


def entry(**changes: Any) -> dict[str, Any]:
    """The header of `VALID` without metadata, its first tensor changed."""
    return TENSORS | {"a": TENSORS["a"] | changes}


def read_by_safetensors(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library finds in a file, or None where it refuses it."""
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in found}


def metadata_by_safetensors(file: Path) -> dict[str, str]:
    with safetensors.safe_open(file, framework="numpy") as opened:
        return opened.metadata() or {}


def has_duplicate_keys(content: bytes) -> bool:
    """Whether an object in the header has a key twice, which the safetensors library lets pass."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        found = found or len({key for key, _ in pairs}) != len(pairs)
        return dict(pairs)

    (length,) = struct.unpack("<Q", content[:8])
    json.loads(content[8 : 8 + length], object_pairs_hook=look)
    return found


def has_controls(text: str) -> bool:
    """Whether a character of the text could drive a terminal."""
    return any(unicodedata.category(character) in {"Cc", "Cf", "Cs"} for character in text)


def slices(header: Header, content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (info.dtype, info.shape, content[info.start : info.stop]) for name, info in header.tensors.items()}


def expect_the_same_verdict(content: bytes, file: Path) -> None:
    """Both read the file alike, or both refuse it; of ours no exception but CheckpointError may come."""
    file.write_bytes(content)
    theirs = read_by_safetensors(content)
    try:
        ours = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        assert not has_controls(str(error))
        assert theirs is None or has_duplicate_keys(content), f"safetensors reads it: {error}"
    else:
        assert theirs is not None, "safetensors refuses it"
        assert slices(ours, content) == theirs
        assert dict(ours.metadata) == metadata_by_safetensors(file)
        assert (ours.size, ours.file) == (len(content), file)


def test_a_valid_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    expect_the_same_verdict(VALID, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert set(header.tensors) == {"a", "b", "empty"}
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_has_the_size_that_safetensors_gives_it(dtype: str, tmp_path: Path) -> None:
    size = DTYPES[dtype].bits
    header = {"x": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}
    content = safetensors_bytes(json.dumps(header), bytes(size))
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        if "unknown variant" in str(error):
            pytest.skip(f"this safetensors does not know {dtype}")
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    assert read_header(file).tensors["x"].nbytes == size


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0"),
    "shorter than a length": (b"\x05\0\0", "3"),
    "length beyond the file": (safetensors_bytes(json.dumps(TENSORS), length=10_000), "10000"),
    "length of 2**63": (safetensors_bytes(json.dumps(TENSORS), length=1 << 63), "9223372036854775808"),
    "length cuts the JSON": (safetensors_bytes(json.dumps(TENSORS), length=40), "JSON"),
    "length swallows data": (safetensors_bytes(json.dumps(TENSORS), length=len(json.dumps(TENSORS)) + 4), "JSON"),
    "no JSON": (safetensors_bytes("hello", b""), "begin"),
    "an array": (safetensors_bytes("[]", b""), "begin"),
    "bytes that are no UTF-8": (safetensors_bytes(b'{"\xff": 1}', b""), "JSON"),
    "a zip archive, as pickles are": (b"PK\x03\x04" + bytes(60), "a zip archive"),
    "deep nesting": (safetensors_bytes('{"x":' + "[" * 100_000, b""), "JSON"),
    "deep nesting, closed": (safetensors_bytes('{"x":' + "[" * 100_000 + "]" * 100_000 + "}", b""), "JSON"),
    "an int of 5,000 digits": (safetensors_bytes('{"x": ' + "9" * 5_000 + "}", b""), "JSON"),
    "NaN": (safetensors_bytes(json.dumps(entry(shape=[float("nan")]))), "NaN"),
    "Infinity": (safetensors_bytes(json.dumps(entry(shape=[float("inf")]))), "Infinity"),
    "a tensor twice": (
        safetensors_bytes('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"\0"),
        "twice",
    ),
    "a field twice": (
        safetensors_bytes('{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"\0"),
        "twice",
    ),
    "half a surrogate pair": (safetensors_bytes('{"__metadata__":{"x":"\\ud800"}}', b""), "JSON"),
    "half a surrogate pair as a name": (
        safetensors_bytes('{"\\udfff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0"),
        "JSON",
    ),
    "metadata that is no object": (safetensors_bytes('{"__metadata__": [1]}', b""), "__metadata__"),
    "metadata that is no string": (safetensors_bytes('{"__metadata__": {"x": 1}}', b""), "__metadata__"),
    "a tensor that is no object": (safetensors_bytes('{"a": 1}', b""), "'a'"),
    "a tensor without shape": (safetensors_bytes('{"a":{"dtype":"U8","data_offsets":[0,0]}}', b""), "'a'"),
    "an unknown dtype": (safetensors_bytes(json.dumps(entry(dtype="F31"))), "'F31'"),
    "a dtype that is a number": (safetensors_bytes(json.dumps(entry(dtype=32))), "'32'"),
    "another dtype's size": (safetensors_bytes(json.dumps(entry(dtype="F16"))), "24 bytes"),
    "another shape's size": (safetensors_bytes(json.dumps(entry(shape=[2, 4]))), "24 bytes"),
    "a negative side": (safetensors_bytes(json.dumps(entry(shape=[-2, -3]))), "shape"),
    "a side that is a fraction": (safetensors_bytes(json.dumps(entry(shape=[2.0, 3]))), "shape"),
    "a side that is true": (safetensors_bytes(json.dumps(entry(shape=[True, 6]))), "shape"),
    "a side that is text": (safetensors_bytes(json.dumps(entry(shape=["2", 3]))), "shape"),
    "a side beyond 64 bits": (safetensors_bytes(json.dumps(entry(shape=[1 << 64, 0]))), "shape"),
    "sides whose product wraps": (safetensors_bytes(json.dumps(entry(shape=[1 << 62, 1 << 62, 6]))), "24 bytes"),
    "sides without end": (safetensors_bytes(json.dumps(entry(shape=[(1 << 62) + 1] * 300_000))), "24 bytes"),
    "a shape that is no list": (safetensors_bytes(json.dumps(entry(shape={"2": 3}))), "shape"),
    "offsets that go back": (safetensors_bytes(json.dumps(entry(data_offsets=[24, 0]))), "data_offsets"),
    "negative offsets": (safetensors_bytes(json.dumps(entry(data_offsets=[-24, 0]))), "data_offsets"),
    "three offsets": (safetensors_bytes(json.dumps(entry(data_offsets=[0, 24, 24]))), "data_offsets"),
    "an overlap": (
        safetensors_bytes(json.dumps(TENSORS | {"b": TENSORS["b"] | {"data_offsets": [16, 24]}})),
        "overlap",
    ),
    "a hole": (safetensors_bytes(json.dumps(TENSORS | {"b": TENSORS["b"] | {"data_offsets": [28, 36]}})), "hole"),
    "a hole at the start": (safetensors_bytes(json.dumps({"b": TENSORS["b"]})), "hole"),
    "data cut short": (safetensors_bytes(json.dumps(TENSORS), DATA[:-1]), "end at byte"),
    "data too long": (safetensors_bytes(json.dumps(TENSORS), DATA + b"\0"), "end at byte"),
    "offsets far beyond the file": (
        safetensors_bytes(json.dumps({"a": {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]}})),
        "end at byte",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_header_is_refused_with_its_fault_and_its_file(what: str, tmp_path: Path) -> None:
    content, named = BROKEN[what]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_header(file)
    assert named in str(raised.value).replace(str(file), "")
    assert str(file) in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


def test_a_header_of_a_million_equal_keys_is_refused_at_once(tmp_path: Path) -> None:
    """The search for the key that occurs twice must not compare every key with every other."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_bytes("{" + ",".join(f'"{n}":0' for n in range(300_000)) + ',"299999":0}', b""))
    with pytest.raises(CheckpointError, match="'299999' occurs twice"):
        read_header(file)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_refused_without_waiting(make: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    make(file)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "x.safetensors")


@given(st.binary(max_size=200))
@FUZZ
def test_random_bytes_never_raise_anything_else(tmp_path: Path, content: bytes) -> None:
    expect_the_same_verdict(content, tmp_path / "x.safetensors")


@given(st.binary(max_size=120), st.binary(max_size=20))
@FUZZ
def test_random_bytes_as_a_header_never_raise_anything_else(tmp_path: Path, text: bytes, data: bytes) -> None:
    expect_the_same_verdict(safetensors_bytes(b"{" + text + b"}", data), tmp_path / "x.safetensors")


NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([1 << 31, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 10**30]),
    st.floats(),
    st.booleans(),
    st.none(),
)
JSON_VALUES = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def tensor_entries(draw: st.DrawFn) -> dict[str, Any]:
    """Tensors one after another, as a writer lays them out, with a fault here and there."""
    tensors: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(st.text(max_size=5), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "F4", "BOOL", "F64", "I4", "f32", ""]))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        size = DTYPES[dtype].bits if dtype in DTYPES else 8
        for side in shape:
            size *= side
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size // 8]}
        offset += size // 8
    if tensors and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(tensors)))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        tensors[name] = tensors[name] | {field: draw(st.one_of(JSON_VALUES, st.lists(NUMBERS, max_size=3)))}
    if draw(st.booleans()):
        tensors["__metadata__"] = draw(
            st.one_of(st.dictionaries(st.text(max_size=3), st.text(max_size=5), max_size=2), JSON_VALUES)
        )
    return tensors


@given(tensor_entries(), st.integers(-1, 1), st.integers(-1, 1), st.booleans(), st.data())
@FUZZ
def test_lying_headers_get_the_verdict_that_safetensors_gives(
    tmp_path: Path, header: dict[str, Any], longer: int, claims: int, ascii_only: bool, data: st.DataObject
) -> None:
    text = json.dumps(header, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    ends = [value["data_offsets"][1] for value in header.values() if isinstance(value, dict) and "dtype" in value
            and isinstance(value.get("data_offsets"), list) and len(value["data_offsets"]) == 2]  # fmt: skip
    size = max([end for end in ends if type(end) is int and 0 <= end < 1000], default=0) + longer
    claimed = len(text) + (claims if data.draw(st.integers(0, 4)) == 0 else 0)
    content = safetensors_bytes(text, bytes(max(size, 0)), length=claimed)
    expect_the_same_verdict(content, tmp_path / "x.safetensors")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["flip", "insert", "delete", "cut"]), st.integers(0, len(VALID)), st.integers(0, 255)
        ),
        min_size=1,
        max_size=4,
    )
)
@FUZZ
def test_a_valid_file_with_damaged_bytes_gets_the_verdict_that_safetensors_gives(
    tmp_path: Path, damages: list[tuple[str, int, int]]
) -> None:
    content = bytearray(VALID)
    for kind, at, byte in damages:
        if kind == "cut":
            del content[at:]
        elif kind == "delete":
            del content[at : at + 1]
        elif kind == "insert":
            content.insert(at, byte)
        elif at < len(content):
            content[at] = byte
    expect_the_same_verdict(bytes(content), tmp_path / "x.safetensors")


@given(
    st.dictionaries(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3),
)
@FUZZ
def test_what_header_bytes_writes_is_read_by_safetensors_and_by_us_alike(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    head = header_bytes(tensors, metadata)
    size = sum(DTYPES[dtype].nbytes * math.prod(shape) for dtype, shape in tensors.values())
    content = head + bytes(size)
    assert len(head) % 8 == 0
    expect_the_same_verdict(content, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == tensors
    assert dict(header.metadata) == metadata


def test_the_same_content_gives_the_same_bytes_whatever_the_order_of_the_metadata() -> None:
    one = header_bytes({"x": ("U8", (1,))}, {"b": "2", "a": "1"})
    assert one == header_bytes({"x": ("U8", (1,))}, {"a": "1", "b": "2"})


# The index of a sharded model.


def shard(*names: str) -> bytes:
    header = {
        name: {"dtype": "U8", "shape": [4], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(names)
    }
    return safetensors_bytes(json.dumps(header), bytes(4 * len(names)))


def sharded(folder: Path, weight_map: object, **more: object) -> Path:
    """A folder with shards one (a, b) and two (c), and an index with this weight_map."""
    folder.mkdir(exist_ok=True)
    (folder / "one.safetensors").write_bytes(shard("a", "b"))
    (folder / "two.safetensors").write_bytes(shard("c"))
    text = json.dumps({"metadata": {}, "weight_map": weight_map} | more)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


HONEST = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def test_an_honest_index_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path / "model", HONEST))
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == HONEST


LYING_MAPS: dict[str, tuple[object, str]] = {
    "is missing": (None, "weight_map"),
    "is empty": ({}, "weight_map"),
    "is a list": (["one.safetensors"], "weight_map"),
    "names the folder above": (HONEST | {"c": "../outside.safetensors"}, "outside"),
    "names a folder below": (HONEST | {"c": "sub/two.safetensors"}, "sub/two"),
    "names an absolute path": (HONEST | {"c": "/etc/passwd.safetensors"}, "passwd"),
    "names another kind of file": (HONEST | {"c": "two.bin"}, "two.bin"),
    "names a backslash path": (HONEST | {"c": "..\\two.safetensors"}, "two"),
    "names a zero byte": (HONEST | {"c": "two\0.safetensors"}, "two"),
    "names 300 letters": (HONEST | {"c": "x" * 300 + ".safetensors"}, "xxx"),
    "names control characters": (HONEST | {"c": "\x1b]0;owned\x07.safetensors"}, "owned"),
    "names half a surrogate pair": (HONEST | {"c": "\ud800.safetensors"}, "JSON"),
    "names a missing shard": (HONEST | {"c": "three.safetensors"}, "three.safetensors"),
    "names itself": (HONEST | {"c": "model.safetensors.index.json"}, "index.json"),
    "names a number": (HONEST | {"c": 2}, "'2'"),
    "names nothing": (HONEST | {"c": None}, "'None'"),
    "has a tensor that is nowhere": (HONEST | {"d": "two.safetensors"}, "'d'"),
    "has a tensor in the wrong shard": (HONEST | {"a": "two.safetensors"}, "'a'"),
}


@pytest.mark.parametrize("what", LYING_MAPS)
def test_an_index_that_lies_is_refused_with_what_it_names(what: str, tmp_path: Path) -> None:
    weight_map, named = LYING_MAPS[what]
    (tmp_path / "outside.safetensors").write_bytes(shard("c"))
    folder = sharded(tmp_path / "model", weight_map)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint.open(folder)
    assert named in str(raised.value)
    assert not has_controls(str(raised.value))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", HONEST)
    (folder / "two.safetensors").write_bytes(shard("c", "a"))
    with pytest.raises(CheckpointError, match=r"'a' is in both 'one\.safetensors' and 'two\.safetensors'"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "two.safetensors", "config.json"]
)
def test_a_fifo_in_the_place_of_a_file_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", HONEST)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name):
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.config == {}
        list(checkpoint.other_files())


def test_a_duplicate_key_in_an_index_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", HONEST)
    text = '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="occurs twice"):
        Checkpoint.open(folder)


def expect_a_true_checkpoint_or_a_refusal(folder: Path) -> None:
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        assert not has_controls(str(error))
        return
    assert {info.file.parent for info in checkpoint.tensors.values()} == {folder}
    assert all(info.stop <= info.file.stat().st_size for info in checkpoint.tensors.values())
    for name, file in json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].items():
        assert checkpoint.tensors[name].file == folder / file


SHARD_NAMES = st.one_of(
    st.sampled_from([*HONEST.values(), "../one.safetensors", "./one.safetensors", ".safetensors", "..safetensors"]),
    st.text(max_size=300).map(lambda name: name + ".safetensors"),
    JSON_VALUES,
)


@given(
    st.one_of(st.dictionaries(st.sampled_from(["a", "b", "c", "d", ""]), SHARD_NAMES, max_size=4), JSON_VALUES),
    st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=2),
)
@FUZZ
def test_no_index_raises_anything_but_a_refusal(tmp_path: Path, weight_map: object, more: dict[str, Any]) -> None:
    expect_a_true_checkpoint_or_a_refusal(sharded(tmp_path / "model", weight_map, **more))


@given(st.integers(0, 200), st.binary(max_size=6), st.integers(0, 6))
@FUZZ
def test_a_damaged_index_is_a_refusal_or_still_true(tmp_path: Path, at: int, inserted: bytes, removed: int) -> None:
    folder = sharded(tmp_path / "model", HONEST)
    index = folder / "model.safetensors.index.json"
    text = index.read_bytes()
    index.write_bytes(text[:at] + inserted + text[at + removed :])
    expect_a_true_checkpoint_or_a_refusal(folder)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode()))
@FUZZ
def test_a_json_file_is_an_object_or_a_refusal_that_names_it(text: bytes) -> None:
    try:
        assert isinstance(parse_json_object(text, Path("model/config.json")), dict)
    except CheckpointError as error:
        assert "'model/config.json' is not a valid JSON file" in str(error)


# Which file of a folder is the model.


@pytest.mark.parametrize(
    ("names", "error", "named"),
    [
        ([], CheckpointError, "holds no safetensors"),
        (["pytorch_model.bin"], CheckpointError, "pickle"),
        (["a.safetensors", "b.safetensors"], CheckpointError, "several models"),
        (["a.safetensors.index.json", "b.safetensors.index.json", "a.safetensors"], CheckpointError, "several models"),
    ],
)
def test_a_folder_without_one_model_is_refused(
    names: list[str], error: type[LoratoolError], named: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(shard("a"))
    with pytest.raises(error, match=named):
        Checkpoint.open(tmp_path)


def test_nothing_at_all_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no model at"):
        Checkpoint.open(tmp_path / "nowhere")


def test_the_only_safetensors_file_of_a_folder_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(shard("a"))
    assert set(Checkpoint.open(tmp_path).tensors) == {"a"}
