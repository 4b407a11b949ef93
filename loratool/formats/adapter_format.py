"""What a file format of adapters is to loratool: how it is told, how its tensors are named, and how it is read.

A format is one file with a `FORMAT` of this type, and one row in `formats.table`. A format that cannot be read yet still tells
what a file holds, so that it can be catalogued.
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
    """What headers and configurations tell of an adapter, whether its numbers can be computed or not.

    Attributes:
        kind: a row's name in `formats.kinds`.
        ranks: the rank of each module of which it can be told.
        alpha: what is stated for most modules; None where nothing is.
        modules: the modules that it changes, as the file spells them.
        base_model: the base's Hub id, path or name as it is stated.
        family: the family of models that it is for, in the words of its trainer (``sdxl_base_v1-0``).
        scaling: what multiplies the update, where the file states that in place of alpha.
        why_not: why its numbers cannot be computed, with the way out; None where it may be computed.
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
        title: what people call it.
        claims: whether files are in this format; told from names, metadata and configuration alone.
        split: the module and the part (``lora_A.weight``) of a tensor's name; None for a name that this format has not.
        describe: what the files hold.
        read: the adapter of the files, for an alpha that the user gives or None; None where loratool does not read the format.
        why_not: why it does not, with the way out.
        write: the tensors, or the bytes of one fp32 number, and the metadata of a file in the format; None where loratool does
            not write it.
        has_names_of_base: whether it calls modules as their base's tensors are called, up to a leading prefix.
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
