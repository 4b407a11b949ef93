"""A digest of an adapter's tensors that does not depend on their file, to recognize copies in other files."""

from __future__ import annotations

from loratool.architecture import module_of
from loratool.checkpoint.fingerprint import fingerprint, hash_tensor
from loratool.formats.adapter import Adapter


def content_of(adapter: Adapter) -> str:
    """Return the fingerprint of an adapter's tensors, 64 hexadecimal digits, computed like a base's (`checkpoint.fingerprint`).

    A PEFT folder and the single file made from it have the same fingerprint, but different sha256. Scaling does not affect it.
    """
    tensors = {
        parameter if update.replaces else f"{module_of(parameter)}.{letter}": info
        for parameter, update in adapter.changes.items()
        for letter, info in update.tensors.items()
    } | dict(adapter.own_base)
    return fingerprint(tensors, {name: hash_tensor(info) for name, info in tensors.items()})
