"""A sharded adapter as one file: its tensors sorted by name, ``{"format": "pt"}`` as metadata, and nothing else.

That file is what the catalogue keeps and what a sharded adapter's fingerprint is the sha256 of, so the same tensors have the same
fingerprint however they are cut into shards.
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
    """The bytes of the one safetensors file that holds these tensors, piece by piece.

    Raises:
        AdapterError: a file became shorter while it was read.
    """
    yield _header(tensors)
    for _, info in sorted(tensors.items()):
        yield from _pieces(info)


def joined_size(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of that file."""
    return len(_header(tensors)) + sum(info.nbytes for info in tensors.values())


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    return header_bytes({name: (info.dtype, info.shape) for name, info in sorted(tensors.items())}, METADATA)


def sha256_of_content(content: Iterable[bytes]) -> str:
    """sha256 of the pieces of a file, 64 hexadecimal digits."""
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
