"""Plan a change of storage from headers alone: which parameters become which tensors, in which files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from loratool.architecture import architecture_of, quantizable_weights, skipped_modules
from loratool.checkpoint.dtypes import DTYPES, Dtype
from loratool.checkpoint.file_role import FileRole, role_of
from loratool.checkpoint.header import TensorInfo, nbytes
from loratool.checkpoint.inheritance import inherited_files
from loratool.checkpoint.layout import Layout, NewTensor, plan_layout
from loratool.checkpoint.model import CONFIG_NAME, Checkpoint
from loratool.errors import CheckpointError, UnsupportedError, quoted
from loratool.formats.names import SUFFIX
from loratool.merging.plan import MergePlan, Target
from loratool.weights import dense
from loratool.weights.dense import DenseWeight
from loratool.weights.making import Making, NewParameter, Option
from loratool.weights.storages import MAKINGS, is_dense, quantized_names, refuse_other_storage, stored_weight
from loratool.weights.stored import StoredWeight

Way = Literal["quantize", "base_as", "dequantize"]
WAYS: Final[tuple[Way, ...]] = ("quantize", "base_as", "dequantize")


@dataclass(frozen=True, slots=True)
class StorageChange:
    """A model's new storage, where it differs from its base's.

    Attributes:
        way: ``quantize``: merge into the dense matrices, then quantize linear modules;
          ``base_as``: quantize linear modules, then merge into the codes; ``dequantize``: make quantized matrices dense.
        making: the storage that matrices are quantized to, for the first two ways.
        compute_dtype: torch's name of the dtype in which a quantized model is multiplied; None for the base's own.
    """

    way: Way
    making: Making | None = None
    compute_dtype: str | None = None

    def to_options(self) -> dict[str, str]:
        """Return the settings that decide the bytes of tensors, as manifest options."""
        if self.making is None:
            return {self.way: "true"}
        return {self.way: self.making.storage} | {name: _text(value) for name, value in self.making.options.items()}

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self | None:
        """Parse the options of a manifest; return None if they record no change of storage.

        Raises:
            KeyError, ValueError, LoratoolError: they record an invalid change.
        """
        way = next((way for way in WAYS if way in options), None)
        if way is None or way == "dequantize":
            return None if way is None else cls(way)
        usual = MAKINGS[options[way]]({}).options
        return cls(way, MAKINGS[options[way]]({name: _value(options[name], value) for name, value in usual.items()}))


def _text(value: Option) -> str:
    """Return an option as a manifest writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str, usual: Option) -> Option:
    """Parse an option of a manifest as the type of its default, `usual`."""
    return text == "true" if isinstance(usual, bool) else type(usual)(text)


@dataclass(frozen=True, slots=True)
class Conversion:
    """The conversion of one parameter to another storage, or a dense parameter that is only merged into.

    Attributes:
        source: the parameter as the base stores it.
        dense: the intermediate matrix, in the order in which it is read; its bytes are in no file.
        turned: whether the dense matrix on disk (source or outcome) is the transpose of the intermediate one.
        new: the final storage; None for dense.
        merge: the updates to add to the intermediate matrix; None if there are none.
        into_image: whether they are added after quantizing, to the codes, instead.
    """

    source: StoredWeight
    dense: DenseWeight
    turned: bool = False
    new: NewParameter | None = None
    merge: Target | None = None
    into_image: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def nbytes(self) -> int:
        """Bytes read for the parameter."""
        return sum(info.nbytes for info in self.source.tensors)

    @property
    def twice(self) -> bool:
        """Whether it is read twice: the merge needs the scales, which depend on the whole matrix."""
        return self.new is not None and self.merge is not None

    @property
    def outcome(self) -> tuple[NewTensor, ...]:
        """The tensors to write."""
        if self.new is not None:
            return self.new.tensors
        shape = self.dense.shape[::-1] if self.turned else self.dense.shape
        return (NewTensor(self.name, self.dense.tensor.dtype, shape),)

    @property
    def storage(self) -> str:
        """The name of the final storage."""
        return self.dense.storage if self.new is None else self.new.storage

    @property
    def replaced(self) -> dict[str, tuple[NewTensor, ...]]:
        """The replacement of each of the base's tensors: the outcome for the first one, nothing for the others."""
        main, *others = self.source.tensors
        return {info.name: () for info in (*others, *self.source.siblings)} | {main.name: self.outcome}

    @property
    def digested(self) -> frozenset[str]:
        """The base's tensors that are read in byte order, so that digests are computed while reading."""
        names = frozenset(info.name for info in self.source.tensors)
        return frozenset() if len(names) > 1 or (self.turned and is_dense(self.source)) else names


def to_quantized(weight: DenseWeight, making: Making, *, turned: bool, updates: Target | None = None,
                 into_image: bool = False) -> Conversion:  # fmt: skip
    """Return the conversion of a dense matrix to a quantized one, merging `updates`.

    They are merged in fp32 and the sums are quantized directly; rounding them to the base's dtype first would round twice.
    With `into_image` they are merged into the quantized matrix instead. If an update replaces the matrix, the replacement is
    quantized.
    """
    rows, columns = weight.shape[::-1] if turned else weight.shape
    dense = DenseWeight(replace(weight.tensor, shape=(rows, columns)))
    new = making.parameter(weight.name, (rows, columns), weight.dtype)
    merge = _on(_unwritten(weight, DTYPES["F32"], (rows, columns)), updates, turned=turned)
    replaces = updates is not None and any(planned.update.replaces for planned in updates.updates)
    return Conversion(weight, dense, turned, new, merge, into_image and updates is not None and not replaces)


def to_dense(weight: StoredWeight, *, turned: bool, updates: Target | None = None) -> Conversion:
    """Return the conversion of a quantized matrix to the dtype that it decodes to; `updates` are added after decoding.

    `turned`: the dense matrix is (in_features, out_features) although the quantized one is (out_features, in_features).
    """
    *stack, outputs, inputs = weight.shape
    shape = (*stack, inputs, outputs) if weight.turned else weight.shape
    dense = _unwritten(weight, weight.dtype, shape)
    return Conversion(weight, dense, turned != weight.turned, merge=_on(dense, updates, turned=weight.turned))


def merged_only(updates: Target) -> Conversion:
    """Return the conversion of a dense parameter that stays dense and is only merged into."""
    weight = updates.weight
    if not isinstance(weight, DenseWeight):
        raise UnsupportedError(
            f"{quoted(weight.name)} in {quoted(weight.tensors[0].file)} is stored {weight.words} and stays so; loratool merges "
            "into dense weights while it changes the storage of others"
        )
    return Conversion(weight, weight, merge=updates)


def _unwritten(weight: StoredWeight, dtype: Dtype, shape: tuple[int, ...]) -> DenseWeight:
    """Return a dense parameter that stands for another one and is in no file."""
    return DenseWeight(TensorInfo(weight.name, dtype.name, shape, weight.tensors[0].file, 0, nbytes(dtype.name, shape)))


def _on(dense: DenseWeight, target: Target | None, *, turned: bool) -> Target | None:
    """Return the target with its updates on the dense matrix, which is the transpose of its own if `turned`."""
    return None if target is None else target.on(dense, turned=turned)


@dataclass(frozen=True)
class ConversionPlan:
    """A complete plan of a change of storage.

    Attributes:
        base: the checkpoint to convert.
        change: the final storage of its matrices.
        conversions: the matrices whose storage or values change, by name.
        config: the new content of ``config.json``; None if the base has none.
        merge: the merge that the conversion includes; None if there is none.
    """

    base: Checkpoint
    change: StorageChange
    conversions: tuple[Conversion, ...]
    config: Mapping[str, Any] | None
    merge: MergePlan | None = None

    @cached_property
    def layout(self) -> Layout:
        """The files to write."""
        return plan_layout(self.base, {name: new for each in self.conversions for name, new in each.replaced.items()})

    @property
    def others(self) -> list[Path]:
        """The base's other files, which are copied unchanged: paths relative to its folder."""
        anew = {
            "" if self.config is None else CONFIG_NAME,
            "" if self.base.index is None else self.base.index.name,
            *(() if self.merge is None else self.merge.files.names),
        }
        files = inherited_files(self.base).files
        return [name for name in files if str(name) not in anew and role_of(name) is not FileRole.OWN]

    @property
    def read_bytes(self) -> int:
        """Bytes of tensors to read."""
        twice = sum(conversion.nbytes for conversion in self.conversions if conversion.twice)
        return self.base.nbytes + twice


def plan_conversion(base: Checkpoint, change: StorageChange, merge: MergePlan | None = None) -> ConversionPlan:
    """Find the matrices of `base` whose storage changes, and what they become, including the updates of `merge`.

    Raises:
        CheckpointError: `base` is damaged, or has no configuration to record the quantization in.
        UnsupportedError: it is already quantized (or, to dequantize, is not), or has no linear modules.
    """
    refuse_other_storage(base, base.path)
    targets = {} if merge is None else {target.name: target for target in merge.targets}
    if change.making is None:
        found, config = _dequantization(base, targets)
    else:
        found, config = _quantization(base, change, change.making, targets)
    named = {conversion.name for conversion in found}
    alone = [name for name in targets if name not in named and base.tensors[name].nbytes]
    conversions = [
        *found,
        *(merged_only(targets[name]) for name in alone),
    ]
    return ConversionPlan(base, change, tuple(sorted(conversions, key=lambda each: each.name)), config, merge)


def _quantization(base: Checkpoint, change: StorageChange, making: Making,
                  targets: Mapping[str, Target]) -> tuple[list[Conversion], Mapping[str, Any]]:  # fmt: skip
    """Return the matrices to quantize, and the new configuration."""
    if not base.config:
        raise CheckpointError(
            f"{quoted(base.path)} has no config.json, which must record the quantization; give a model's whole folder"
        )
    if base.config.get("quantization_config") or quantized_names(base):
        raise UnsupportedError(
            f"{quoted(base.path)} is already quantized; merge into it as it is, or give the dense model that it was made from"
        )
    architecture = architecture_of(base.config, base.tensors)
    conversions = [
        to_quantized(
            _dense(name, base),
            making,
            turned=architecture.is_conv1d(name),
            updates=targets.get(name),
            into_image=change.way == "base_as",
        )
        for name in quantizable_weights(architecture)
    ]
    if not conversions:
        raise UnsupportedError(f"{quoted(base.path)} has no linear modules with a weight; there is nothing to quantize")
    dtypes = Counter(each.dense.dtype.torch_name for each in conversions)
    compute_dtype = change.compute_dtype or dtypes.most_common(1)[0][0]
    quantization = making.quantization_config(compute_dtype, skipped_modules(architecture))
    return conversions, {**base.config, "quantization_config": quantization}


def _dequantization(base: Checkpoint,
                    targets: Mapping[str, Target]) -> tuple[list[Conversion], Mapping[str, Any] | None]:  # fmt: skip
    """Return the matrices that become dense, and the new configuration."""
    architecture = architecture_of(base.config, base.tensors)
    conversions = [
        to_dense(_quantized(name, base), turned=architecture.is_conv1d(name), updates=targets.get(name))
        for name in quantized_names(base)
    ]
    if not conversions:
        raise UnsupportedError(f"{quoted(base.path)} has no quantized matrices; merge without --dequantize")
    _refuse_unknown(base)
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    return conversions, config if base.config else None


def _refuse_unknown(base: Checkpoint) -> None:
    """Raise UnsupportedError for a matrix that is neither dense nor decodable: the new configuration could not describe it."""
    for name, info in base.tensors.items():
        if name.endswith(SUFFIX) and len(info.shape) == 2 and stored_weight(base, name) is None:
            raise UnsupportedError(
                f"{quoted(name)} in {quoted(info.file)} is stored as {info.dtype}, which loratool cannot dequantize; merge "
                "without --dequantize"
            )


def _dense(name: str, base: Checkpoint) -> DenseWeight:
    weight = dense.claim(base, name)
    if weight is None:
        raise UnsupportedError(
            f"{quoted(name)} in {quoted(base.tensors[name].file)} is stored as {base.tensors[name].dtype}; loratool "
            "quantizes fp32, fp16 and bf16 matrices"
        )
    return weight


def _quantized(name: str, base: Checkpoint) -> StoredWeight:
    weight = stored_weight(base, name)
    if weight is None or is_dense(weight):
        raise CheckpointError(
            f"{quoted(base.path)} says how {quoted(name)} is quantized, but one of its tensors is missing; "
            "download the model again"
        )
    return weight
