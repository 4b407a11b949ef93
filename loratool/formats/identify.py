"""Identify an adapter of any kind and format, for the catalogue, without computing its update and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from loratool.errors import AdapterError, UnsupportedError, printable, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles, open_adapter
from loratool.formats.adapter_format import AdapterFormat, Description
from loratool.formats.alpha import Alpha
from loratool.formats.bare import described_alpha
from loratool.formats.finite import refuse_not_finite, refuse_numbers_not_finite
from loratool.formats.identity import AnyAdapter, Identity
from loratool.formats.kinds import KINDS, NEVER_ALONE, kind_named
from loratool.formats.read import read_files
from loratool.formats.table import format_of
from loratool.formats.trained_beside import with_trained_beside

LONGEST_FAMILY: Final = 255
"""Length limit of a family's name in the catalogue, in characters."""


def read_or_identify(path: Path, alpha: Alpha | None = None) -> AnyAdapter:
    """Return the adapter at `path`, or its identity if loratool does not compute it.

    Args:
        path: of its folder or file.
        alpha: for a file that does not state its own.

    Raises:
        NotFoundError: nothing is there.
        AdapterError: it is not a recognizable adapter, is damaged or a pickle, or can be computed but states no alpha.
    """
    found = identify(path, alpha)
    return found if found.adapter is None else found.adapter


def identify(path: Path, alpha: Alpha | None = None) -> Identity:
    """Identify the adapter at `path`, and read it if loratool can.

    Args:
        path: of its folder or file.
        alpha: for a file that does not state its own.

    Raises:
        NotFoundError: nothing is there.
        AdapterError: it is not a recognizable adapter, is damaged or a pickle, or can be read but states no alpha.
    """
    return identify_files(open_adapter(path), alpha)


def identify_files(files: AdapterFiles, alpha: Alpha | None = None) -> Identity:
    """Do the same for files that are already open."""
    found = format_of(files)
    try:
        adapter = read_files(files, alpha)
    except UnsupportedError as error:
        description = found.describe(files)
        _refuse_hollow(files, found, description)
        return with_trained_beside(_described(files, found, description, str(error)))
    return _read(files, found, found.describe(files), adapter)


def refuse_broken_numbers(found: AnyAdapter) -> None:
    """Raise AdapterError if the adapter's tensors contain NaN or infinity."""
    if isinstance(found, Adapter):
        refuse_not_finite(found)
    else:
        refuse_numbers_not_finite(found.files.tensors.values())


def refuse_alpha(found: AnyAdapter, alpha: Alpha | None) -> None:
    """Raise AdapterError if an alpha is given for an adapter that is not computed."""
    if isinstance(found, Identity) and alpha is not None:
        raise AdapterError(f"{found.why_not}; leave --alpha out")


def _refuse_hollow(files: AdapterFiles, found: AdapterFormat, description: Description) -> None:
    """Raise AdapterError if an uncomputed adapter has an empty tensor, or no tensor of its kind."""
    empty = next((info for info in files.tensors.values() if 0 in info.shape), None)
    if empty is not None:
        raise AdapterError(
            f"{quoted(empty.name)} in {quoted(files.source)} is empty (shape {list(empty.shape)}); was it saved from a sharded "
            "run without gathering?"
        )
    are_named_alike = description.kind in KINDS and description.kind not in NEVER_ALONE
    if not files.tensors or (are_named_alike and not any(map(found.split, files.tensors))):
        raise AdapterError(
            f"{quoted(files.config_source)} says {kind_named(description.kind).title}, but {quoted(files.source)} has no tensor "
            "of that kind; download or save the adapter again"
        )


def _family(description: Description) -> str | None:
    family = printable(description.family or "")[:LONGEST_FAMILY]
    return family or None


def _described(files: AdapterFiles, found: AdapterFormat, description: Description, why_not: str) -> Identity:
    return Identity(
        name=files.name,
        files=files,
        sha256=files.sha256(),
        format=found.name,
        kind=description.kind,
        adapter=None,
        why_not=why_not,
        ranks=dict(sorted(description.ranks.items())),
        alpha=description.alpha if description.alpha is not None else described_alpha(files, description.ranks),
        scaling=description.scaling,
        modules=description.modules,
        config=files.config,
        facts=files.facts,
        base_model=description.base_model,
        family=_family(description),
        notes=description.notes,
    )


def _read(files: AdapterFiles, found: AdapterFormat, description: Description, adapter: Adapter) -> Identity:
    return Identity(
        name=adapter.name,
        files=files,
        sha256=adapter.sha256,
        format=found.name,
        kind=adapter.kind,
        adapter=adapter,
        why_not=None,
        ranks=adapter.ranks,
        alpha=adapter.alpha,
        scaling=adapter.scaling,
        modules=adapter.modules,
        config=adapter.config,
        facts=adapter.facts,
        base_model=adapter.base_model or description.base_model,
        family=_family(description),
        notes=adapter.notes,
    )
