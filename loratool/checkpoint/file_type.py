"""Types of files by their first bytes, for files that are not what their names say: archives, pickles, web pages, pointers.

Read as safetensors, their first bytes would be a header length of petabytes, and the error would be misleading.
"""

from __future__ import annotations

from typing import Final

LOOKED_AT: Final = 512
"""Number of first bytes that `type_by_content` looks at."""

LEAST_ZEROS: Final = 64
"""Smallest number of zero bytes that identifies an unfinished download."""

LONGEST_SHOWN: Final = 40
"""Largest number of characters of a text that a message shows."""

_AGAIN: Final = "the download failed, so download it again"
_UNPACK: Final = "unpack it, and give the folder or file that is in it"
_PICKLE: Final = (
    "which can run code when opened, so loratool never does; load it where you trust it, and save it as safetensors"
)

SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"GGUF", "a GGUF file; give the safetensors file that it was converted from"),
    (0, b"ggla", "an adapter in llama.cpp's old GGML format; convert the adapter that it was made from again"),
    *((0, bytes([0x80, protocol]), f"a pickle, {_PICKLE}") for protocol in (2, 3, 4, 5)),
    (0, b"\x93NUMPY", "an array of numpy (npy); save it as safetensors"),
    (0, b"\x89HDF", "an HDF5 file; save it as safetensors"),
    (0, b"\x1f\x8b", f"a gzip archive; {_UNPACK}"),
    (0, b"BZh", f"a bzip2 archive; {_UNPACK}"),
    (0, b"\xfd7zXZ", f"an xz archive; {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"a zstd archive; {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {_UNPACK}"),
    (0, b"Rar!", f"a RAR archive; {_UNPACK}"),
    (257, b"ustar", f"a tar archive; {_UNPACK}"),
    (0, b"\x89PNG", "a picture; give the safetensors file that belongs to it"),
    (0, b"\xff\xd8\xff", "a picture; give the safetensors file that belongs to it"),
    (0, b"%PDF", "a PDF file; give the safetensors file that belongs to it"),
    (0, b"version https://git-lfs", "a Git LFS pointer and not the file itself; get that with 'git lfs pull'"),
)
"""For each type: the offset and value of its signature, and a phrase for messages."""

_ZIP: Final = b"PK\x03\x04"
_ZIP_NAME: Final = 30
"""Offset of the first member's name in a zip archive. The length of the name is at offset 26."""


def type_by_content(head: bytes) -> str | None:
    """Return what a file is and what to do about it, as a phrase; None if its type is unknown.

    `head` holds its first `LOOKED_AT` bytes, or the whole file.
    """
    if not head:
        return f"an empty file (0 bytes); {_AGAIN}"
    if head.startswith(_ZIP):
        return _zip(head)
    known = next((what for at, magic, what in SIGNATURES if head.startswith(magic, at)), None)
    if known is not None:
        return known
    if len(head) >= LEAST_ZEROS and not any(head):
        return "a file of zeros, which an unfinished download leaves; download it again"
    return _text(head)


def _zip(head: bytes) -> str:
    """Describe a zip archive: torch writes its pickles as one, numpy its arrays."""
    length = int.from_bytes(head[26:28], "little")
    name = head[_ZIP_NAME : _ZIP_NAME + length]
    if name.endswith((b"data.pkl", b".format_version", b"byteorder")):
        return f"a zip archive with a pickle in it, as torch.save writes it, {_PICKLE}"
    if name.endswith(b".npy"):
        return "a zip archive of numpy arrays (npz); save it as safetensors"
    return f"a zip archive; {_UNPACK}"


def _text(head: bytes) -> str | None:
    """Describe a text: a web page, JSON, or the error message of a server; None if it is not text."""
    try:
        text = head.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        if error.start < LOOKED_AT - 4:
            return None
        text = head[: error.start].decode("utf-8-sig").strip()
    if not text or any(not character.isprintable() and not character.isspace() for character in text):
        return None
    if text.startswith("<"):
        return f"a web page; {_AGAIN}"
    if text.startswith(("{", "[")):
        return "a text (JSON); give the safetensors file that belongs to it, or download it again"
    words = " ".join(text.splitlines()[0].split())
    shown = words if len(words) <= LONGEST_SHOWN else f"{words[: LONGEST_SHOWN - 1]}…"
    return f"a text ('{shown}'), perhaps the error message of a server; download it again, or give the file with the weights"
