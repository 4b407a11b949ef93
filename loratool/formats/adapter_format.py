"""A file format of adapters: how it is recognized, how its tensors are named, and how it is read.

A format is one file with a `FORMAT` of this type, and one row in `formats.table`. A format that loratool cannot read yet still
describes what a file contains, so that it can be catalogued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loratool.checkpoint.header import TensorInfo
from loratool.formats.adapter import Adapter
from loratool.formats.adapter_files import AdapterFiles
from loratool.formats.alpha import Alpha


@dataclass(frozen=True, slots=True)
class Description:
    """What headers and configurations say about an adapter, whether or not its numbers can be computed.

    Attributes:
        kind: a row's name in `formats.kinds`.
        ranks: the rank of each module, where known.
        alpha: the alpha stated for most modules; None if none is stated.
        modules: the modules that it changes, as named in the file.
        base_model: the stated Hub id, path or name of the base.
        family: the model family that it is for, as its trainer names it (``sdxl_base_v1-0``).
        scaling: the factor of the update, if the file states it instead of alpha.
        why_not: why its numbers cannot be computed, and what to do; None if they may be.
        notes: what a user should know.
    """

    kind: str
    ranks: Mapping[str, int]
    alpha: float | None
    modules: tuple[str, ...]
    base_model: str | None = None
    family: str | None = None
    scaling: float | None = None
    why_not: str | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class AdapterFormat:
    """One format.

    Attributes:
        name: the word for it in the catalogue.
        title: its name for people.
        claims: returns whether files are in this format, from names, metadata and configuration alone.
        split: splits a tensor's name into module and part (``lora_A.weight``); returns None for names of other formats.
        describe: returns what the files contain.
        read: reads the adapter, given the user's alpha or None; None if loratool does not read the format.
        why_not: why loratool does not read it, and what to do.
        write: returns the tensors (or the bytes of one fp32 number) and the metadata of a file in the format; None if loratool
          does not write it.
        has_names_of_base: whether modules are named like the base's tensors, up to a leading prefix.
        stands_alone: whether it claims whole files only, because beside others its tensors may belong to them.
    """

    name: str
    title: str
    claims: Callable[[AdapterFiles], bool]
    split: Callable[[str], tuple[str, str] | None]
    describe: Callable[[AdapterFiles], Description]
    read: Callable[[AdapterFiles, Alpha | None], Adapter] | None = None
    why_not: str = ""
    write: Callable[[Adapter], tuple[Mapping[str, TensorInfo | bytes], dict[str, str]]] | None = None
    has_names_of_base: bool = False
    stands_alone: bool = False
