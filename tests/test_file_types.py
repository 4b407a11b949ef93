"""What a file that is not what its name says is called: an archive, a pickle, a web page, a pointer."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.checkpoint.file_type import LOOKED_AT, type_by_content
from loratool.checkpoint.header import read_header
from loratool.checkpoint.json_text import read_json_object
from loratool.errors import CheckpointError


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


def made_by(write: Callable[[Any], Any]) -> bytes:
    content = io.BytesIO()
    write(content)
    return content.getvalue()


def tarred(file: io.BytesIO) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(__file__, "x")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 14064895815\n"

OTHER_TYPES: dict[str, tuple[bytes, str]] = {
    "GGUF": (b"GGUF" + bytes(60), "a GGUF file"),
    "torch.save": (made_by(lambda file: torch.save({"a": torch.ones(2)}, file)), "a zip archive with a pickle in it"),
    "torch.save of old": (
        made_by(lambda file: torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)), "a pickle"
    ),
    "npz": (made_by(lambda file: np.savez(file, a=np.ones(2))), "a zip archive of numpy arrays (npz)"),
    "npy": (made_by(lambda file: np.save(file, np.ones(2))), "an array of numpy"),
    "a zip archive": (zipped("adapter_config.json"), "a zip archive; unpack it"),
    "a tar archive": (made_by(tarred), "a tar archive; unpack it"),
    "gzip": (gzip.compress(b"x" * 50), "a gzip archive; unpack it"),
    "bzip2": (bz2.compress(b"x" * 50), "a bzip2 archive; unpack it"),
    "xz": (lzma.compress(b"x" * 50), "an xz archive; unpack it"),
    "a web page": (b"\n\n<!DOCTYPE html><html>404", "a web page; the download failed"),
    "a pointer": (POINTER, "a Git LFS pointer and not the file itself; get that with 'git lfs pull'"),
    "an answer": (b"Entry not found", "a text ('Entry not found')"),
    "a long answer in many bytes a letter": ("日本語".encode() * 300, "a text ('日本語"),
    "an answer in JSON": (b'{"error": "Repository not found"}', "a text (JSON)"),
    "nothing": (b"", "an empty file (0 bytes); the download failed"),
    "zeros": (bytes(600), "a file of zeros"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHER_TYPES)
def test_a_file_of_another_type_is_called_what_it_is(what: str, tmp_path: Path) -> None:
    content, named = OTHER_TYPES[what]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_header(file)
    assert f"it is {named}" in str(raised.value)
    assert ";" in str(raised.value)
    assert "claims" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(("content", "named"), [(b"<html>404</html>", "a web page"), (POINTER, "a Git LFS pointer")])
def test_so_is_one_that_should_be_json(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"valid JSON file: it is {named}"):
        read_json_object(tmp_path / "adapter_config.json")


@given(st.binary(max_size=700))
@settings(max_examples=200, deadline=None)
def test_any_bytes_have_a_type_that_can_be_shown_or_none(content: bytes) -> None:
    what = type_by_content(content[:LOOKED_AT])
    assert what is None or (what.isprintable() and len(what) < 300)
