"""The plan of a change of storage: which matrices become which tensors, in which files. Made from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.header import TensorInfo, nbytes
from loratool.checkpoint.inheritance import inherited_files
from loratool.checkpoint.layout import Layout, NewTensor, plan_layout
from loratool.checkpoint.model import Checkpoint
from loratool.merging.plan import MergePlan, Target
from loratool.weights.dense import DenseWeight
from loratool.weights.four_bit import FourBitWeight
from loratool.weights.nf4 import BLOCKSIZES, Nf4Layout, Nf4Options

CONFIG_NAME: Final = "config.json"
TORCH_NAMES: Final[Mapping[str, str]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_NAMES: Final[Mapping[str, str]] = {name: dtype for dtype, name in TORCH_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Storage:
    """How a model is to be stored where its base is stored otherwise.

    Attributes:
        way: ``quantize``: linear modules in NF4, what is merged being merged into the dense matrices before;
            ``base_as``: the same, but merged into their NF4 image; ``dequantize``: 4-bit matrices become dense.
        nf4: how matrices are quantized, in the first two ways.
        compute_dtype: what a program multiplies in that loads an NF4 model, as torch calls it; None for the base's own.
    """

    way: Literal["quantize", "base_as", "dequantize"]
    nf4: Nf4Options = field(default_factory=Nf4Options)
    compute_dtype: str | None = None

    def to_options(self) -> dict[str, str]:
        """What of it decides the bytes of tensors, as the options of a manifest."""
        if self.way == "dequantize":
            return {"dequantize": "true"}
        double_quant = "true" if self.nf4.double_quant else "false"
        return {self.way: "nf4", "blocksize": str(self.nf4.blocksize), "double_quant": double_quant}

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self | None:
        """The storage that the options of a manifest tell, or None; KeyError or ValueError for what is none's."""
        if "dequantize" in options:
            return cls("dequantize")
        if not {"quantize", "base_as"} & options.keys():
            return None
        nf4 = Nf4Options(int(options["blocksize"]), options["double_quant"] == "true")
        if nf4.blocksize not in BLOCKSIZES:
            raise ValueError("blocksize")
        return cls("quantize" if "quantize" in options else "base_as", nf4)


@dataclass(frozen=True, slots=True)
class Conversion:
    """One matrix on its way to another storage, or one that is only merged into beside such matrices.

    Attributes:
        source: the matrix as the base stores it.
        dense: the matrix in between, (out_features, in_features); its bytes lie in no file.
        turned: whether the dense matrix on disk, source or outcome, is (in_features, out_features), as in a Conv1D.
        nf4: how it is stored in the end; None for dense.
        merge: the updates that are added to the matrix in between; None where there are none.
        into_image: whether they are added, not to that, but to what it is quantized to.
    """

    source: DenseWeight | FourBitWeight
    dense: DenseWeight
    turned: bool = False
    nf4: Nf4Layout | None = None
    merge: Target | None = None
    into_image: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def nbytes(self) -> int:
        """Bytes that the matrix takes in the base."""
        return sum(info.nbytes for info in self.source.tensors)

    @property
    def twice(self) -> bool:
        """Whether it is read twice: what is merged waits for the scales, which depend on the whole matrix."""
        return self.nf4 is not None and self.merge is not None

    @property
    def outcome(self) -> tuple[NewTensor, ...]:
        """The tensors that are written."""
        if self.nf4 is not None:
            return self.nf4.tensors
        shape = self.dense.shape[::-1] if self.turned else self.dense.shape
        return (NewTensor(self.name, self.dense.tensor.dtype, shape),)

    @property
    def storage(self) -> str:
        """The field's name for the storage in the end."""
        return self.dense.storage if self.nf4 is None else "nf4"

    @property
    def replaced(self) -> dict[str, tuple[NewTensor, ...]]:
        """What stands in the place of each of the base's tensors; the outcome in that of the matrix itself."""
        gone: dict[str, tuple[NewTensor, ...]] = {info.name: () for info in self.source.siblings}
        return gone | {self.name: self.outcome}

    @property
    def digested(self) -> frozenset[str]:
        """The names of the base's tensors that are read in the order of their bytes, so that digests are made on the way."""
        is_in_order = isinstance(self.source, FourBitWeight) or not self.turned
        return frozenset({self.name}) if is_in_order else frozenset()


def to_nf4(weight: DenseWeight, options: Nf4Options, *, turned: bool, updates: Target | None = None,
           into_image: bool = False) -> Conversion:  # fmt: skip
    """The conversion of a dense matrix to NF4, with `updates` on the way.

    They are merged into the dense matrix in fp32, and the sums are quantized: rounded to the base's dtype before, they would be
    rounded twice. With `into_image` they are merged into what the matrix is quantized to, but for a replacement, which leaves
    nothing of that.
    """
    rows, columns = weight.shape[::-1] if turned else weight.shape
    dense = DenseWeight(replace(weight.tensor, shape=(rows, columns)))
    nf4 = Nf4Layout(weight.name, (rows, columns), TORCH_NAMES[weight.tensor.dtype], options)
    merge = _on(_in_fp32(dense), updates, turned=turned)
    adds = updates is not None and all(planned.update.additive for planned in updates.updates)
    return Conversion(weight, dense, turned, nf4, merge, into_image and adds)


def to_dense(weight: FourBitWeight, *, turned: bool, updates: Target | None = None) -> Conversion:
    """The conversion of a 4-bit matrix to the dtype that it decodes to; `updates` are added to what is decoded."""
    dtype = SAFETENSORS_NAMES[weight.state.dtype]
    dense = DenseWeight(TensorInfo(weight.name, dtype, weight.shape, weight.codes.file, 0, nbytes(dtype, weight.shape)))
    return Conversion(weight, dense, turned, merge=_on(dense, updates, turned=False))


def merged_only(weight: DenseWeight, updates: Target) -> Conversion:
    """No change of storage: a dense parameter that is merged into."""
    return Conversion(weight, weight, merge=updates)


def _in_fp32(dense: DenseWeight) -> DenseWeight:
    """The same matrix, as if it were stored in fp32."""
    info = dense.tensor
    return DenseWeight(TensorInfo(info.name, "F32", info.shape, info.file, 0, nbytes("F32", info.shape)))


def _on(dense: DenseWeight, target: Target | None, *, turned: bool) -> Target | None:
    """The target with its updates on the dense matrix, whose rows are outputs where it was `turned`."""
    return None if target is None else replace(target, weight=dense, transposed=target.transposed != turned)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that a change of storage does.

    Attributes:
        base: the checkpoint that it starts from.
        storage: how its matrices are stored in the end.
        conversions: the matrices whose storage changes, or that are merged into, by name.
        config: the new content of ``config.json``; None where the base has none.
        merge: what is merged on the way; None where nothing is.
    """

    base: Checkpoint
    storage: Storage
    conversions: tuple[Conversion, ...]
    config: Mapping[str, Any] | None
    merge: MergePlan | None = None

    @cached_property
    def layout(self) -> Layout:
        """The files that are written."""
        return plan_layout(self.base, {name: new for each in self.conversions for name, new in each.replaced.items()})

    @property
    def others(self) -> list[Path]:
        """The base's other files that come along as they are: paths relative to its folder."""
        anew = {
            "" if self.config is None else CONFIG_NAME,
            "" if self.base.index is None else self.base.index.name,
        }
        files = inherited_files(self.base).files
        return [name for name in files if str(name) not in anew and role_of(name) is not FileRole.OWN]

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors that are read."""
        twice = sum(conversion.nbytes for conversion in self.conversions if conversion.twice)
        return self.base.nbytes + twice
