"""What an adapter's tensors are, whatever file they lie in: a digest by which a copy in another file is known."""

from __future__ import annotations

from loratool.architecture import module_of
from loratool.checkpoint.fingerprint import fingerprint, hash_tensor
from loratool.formats.adapter import Adapter


def content_of(adapter: Adapter) -> str:
    """The fingerprint of an adapter's tensors, 64 hexadecimal digits; made as a base's is (`checkpoint.fingerprint`).

    A PEFT folder and the single file made of it have one, though not the same sha256. How the tensors are scaled does not
    enter.
    """
    tensors = {
        parameter if update.replaces else f"{module_of(parameter)}.{letter}": info
        for parameter, update in adapter.changes.items()
        for letter, info in update.tensors.items()
    }
    return fingerprint(tensors, {name: hash_tensor(info) for name, info in tensors.items()})
