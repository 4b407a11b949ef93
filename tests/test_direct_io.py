"""Bytes written past the page cache lie in the file as if they had been written any other way."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch

from loratool.checkpoint import direct_io
from loratool.checkpoint.direct_io import PAGE_BYTES, SLACK_BYTES, TensorWriter, open_direct, skip_to_lie_as_at
from loratool.errors import OutputError

FILE_BYTES = 1 << 20
LARGE_BLOCKS = [3 * PAGE_BYTES + 16, 1 << 18, 2 * PAGE_BYTES + 8]
BLOCKS = [PAGE_BYTES, 8, 3 * PAGE_BYTES + 16, 1 << 18, 4080, 2 * PAGE_BYTES - 8]


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(FILE_BYTES)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int, Path]]:
    """The same file of zeros open for both ways of writing."""
    file = tmp_path / "weights"
    fd = os.open(file, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, FILE_BYTES)
    past_cache = open_direct(file)
    if past_cache is None:
        pytest.skip("this file system has no way past the page cache")
    yield past_cache, fd, file
    os.close(past_cache)
    os.close(fd)


def write_all(content: bytes, past_cache: int, fd: int, start: int, sizes: Sequence[int] = BLOCKS) -> None:
    """Write `content` from `start` on, block after block, as a merge does."""
    buffer, at = torch.empty(max(sizes) + SLACK_BYTES, dtype=torch.uint8), start
    writer, turn = TensorWriter(fd, past_cache), cycle(sizes)
    while at < len(content):
        block = content[at : at + next(turn)]
        skip = skip_to_lie_as_at(buffer, at)
        part = slice(skip, skip + len(block))
        view = memoryview(buffer.numpy())
        view[part] = block
        writer.write(view, part, at)
        at += len(block)
    writer.close()


@pytest.mark.parametrize("start", [0, 8, 136, 4088, 4096, 5000, 4097, 77])
def test_every_byte_arrives(start: int, content: bytes, files: tuple[int, int, Path]) -> None:
    past_cache, fd, file = files
    write_all(content, past_cache, fd, start)
    assert file.read_bytes() == bytes(start) + content[start:]


def test_whole_pages_go_past_the_cache(
    content: bytes, files: tuple[int, int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    past_cache, fd, _ = files
    written = {past_cache: 0, fd: 0}
    pwrite = os.pwrite

    def counting(target: int, view: memoryview, offset: int) -> int:
        written[target] += len(view)
        return pwrite(target, view, offset)

    monkeypatch.setattr(os, "pwrite", counting)
    write_all(content, past_cache, fd, 136, LARGE_BLOCKS)
    assert written[fd] < 2 * PAGE_BYTES
    assert sum(written.values()) == FILE_BYTES - 136


def test_a_disk_that_wants_larger_pages_gets_the_bytes_through_the_cache(
    content: bytes, files: tuple[int, int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    past_cache, fd, file = files
    pwrite = os.pwrite

    def picky(target: int, view: memoryview, offset: int) -> int:
        if target == past_cache and (offset % 16384 or len(view) % 16384):
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(target, view, offset)

    monkeypatch.setattr(os, "pwrite", picky)
    write_all(content, past_cache, fd, 8)
    assert file.read_bytes() == bytes(8) + content[8:]


def test_a_full_disk_is_an_error(content: bytes, files: tuple[int, int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    past_cache, fd, _ = files

    def full(target: int, view: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_all(content, past_cache, fd, 0)
