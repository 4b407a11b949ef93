"""Read an adapter in any format; its files' content decides the format, never a flag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratool.errors import UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles, open_adapter
from loratool.formats.alpha import Alpha
from loratool.formats.kinds import kind_named
from loratool.formats.table import format_of
from loratool.formats.trained_beside import with_trained_beside


def read_adapter(path: Path, alpha: Alpha | None = None) -> Adapter:
    """Read the adapter at `path`: a folder, a file, or an index of shards.

    Args:
        path: of its folder or file.
        alpha: alpha for a file that does not state it; if the file states it, the two must be equal.

    Raises:
        NotFoundError: nothing is there.
        UnsupportedError: it is of a kind or in a format that loratool does not compute.
        AdapterError: it is damaged, incomplete, a pickle, or without an alpha.
    """
    return read_files(open_adapter(path), alpha)


def read_files(files: AdapterFiles, alpha: Alpha | None = None) -> Adapter:
    """Read an adapter whose files are already open; arguments and errors are those of `read_adapter`."""
    found = format_of(files)
    if found.read is None:
        described = found.describe(files)
        kind = kind_named(described.kind)
        raise UnsupportedError(
            f"{quoted(files.source)} is {kind.title} in the {found.title} format: {described.why_not or found.why_not}"
        )
    return replace(with_trained_beside(found.read(files, alpha)), states=files.states)
