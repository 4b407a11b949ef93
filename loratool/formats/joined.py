"""A sharded adapter as one file, with only its tensors, sorted by name, and the metadata ``{"format": "pt"}``.

The catalogue keeps that file, and its sha256 is the adapter's fingerprint. The fingerprint therefore does not depend on how the
tensors are cut into shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from loratool.checkpoint.header import TensorInfo, header_bytes
from loratool.errors import AdapterError, quoted

METADATA: Final = {"format": "pt"}
_CHUNK: Final = 1 << 20


def joined_content(tensors: Mapping[str, TensorInfo]) -> Iterator[bytes]:
    """Yield the bytes of the single safetensors file that contains these tensors, piece by piece.

    Raises:
        AdapterError: a file became shorter while it was read.
    """
    yield _header(tensors)
    for _, info in sorted(tensors.items()):
        yield from _pieces(info)


def joined_size(tensors: Mapping[str, TensorInfo]) -> int:
    """Return the size of that file in bytes."""
    return len(_header(tensors)) + sum(info.nbytes for info in tensors.values())


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    return header_bytes({name: (info.dtype, info.shape) for name, info in sorted(tensors.items())}, METADATA)


def sha256_of_content(content: Iterable[bytes]) -> str:
    """Return the sha256 of a file given in pieces, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def _pieces(info: TensorInfo) -> Iterator[bytes]:
    with open(info.file, "rb") as stream:
        stream.seek(info.start)
        left = info.nbytes
        while left:
            piece = stream.read(min(left, _CHUNK))
            if not piece:
                raise AdapterError(f"{quoted(info.file)} became shorter while it was read; run the command again")
            left -= len(piece)
            yield piece
