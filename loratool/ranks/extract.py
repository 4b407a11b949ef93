"""An adapter from a fine-tuned model and its base: the difference of each matrix, approximated by a product of factors.

The plan pairs the tensors of the two checkpoints by their headers alone. Then the pairs are streamed one at a time, so that
memory holds the factors and a few blocks of rows, whatever the size of the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from loratool.architecture import Orientation, Role, architecture_of
from loratool.checkpoint.blocks import read_exactly
from loratool.checkpoint.dtypes import DENSE
from loratool.checkpoint.header import TensorInfo
from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, PlacementError, UnsupportedError, nearest, quoted
from loratool.formats.adapter_draft import Draft
from loratool.formats.landing import Landing, land
from loratool.formats.names import SUFFIX
from loratool.merging.stream import opened
from loratool.merging.ties import is_tied_embedding, tied
from loratool.merging.vocabulary import misfit_advice
from loratool.ranks.difference import Difference
from loratool.ranks.low_rank_fit import Wanted, fit
from loratool.updates.replacement import Replacement
from loratool.weights.storages import is_dense, refuse_other_storage, stored_weight

BUFFERS: Final = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".position_ids")
"""Suffixes of buffers in old checkpoints. No model needs them, since they follow from the configuration."""

COMPARED_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor in both checkpoints. `transposed`: it is stored as (in_features, out_features)."""

    tuned: TensorInfo
    base: TensorInfo
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class ExtractPlan:
    """The pairs to compare: matrices of linear layers by module, and `others` by name, as the tuned model spells them.

    `tied` holds the names of `others` that are embedding and output head at once.
    """

    linear: Mapping[str, Pair]
    others: Mapping[str, Pair]
    tied: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the tuned model's tensors to compare."""
        return sum(pair.tuned.nbytes for pairs in (self.linear, self.others) for pair in pairs.values())


@dataclass(frozen=True, slots=True)
class Extraction:
    """The result of an extraction.

    Attributes:
        ranks: the rank of each module of the adapter.
        errors: for each of these modules, the Frobenius norm of its residual, relative to that of the difference.
        error: the same over all these modules.
        randomized: the modules whose factors the randomized method found.
        unchanged: the number of linear layers that are equal in both models. The adapter leaves them out.
        left_out: names of other tensors that changed, which no LoRA can hold.
        kept: the tensors that the adapter holds whole, by their names in the tuned model.
    """

    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float
    randomized: tuple[str, ...]
    unchanged: int
    left_out: tuple[str, ...]
    kept: Mapping[str, Replacement]

    @property
    def kept_modules(self) -> tuple[str, ...]:
        """The sorted names of the modules that the adapter holds whole, for ``modules_to_save``."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.kept}))


def plan_extract(tuned: Checkpoint, base: Checkpoint, wanted: Wanted) -> ExtractPlan:
    """Pair the tensors of two checkpoints, and check the requested rank or energy.

    Raises:
        LoratoolError: the rank or energy is out of range.
        PlacementError: one checkpoint lacks tensors of the other, or a tensor has different shapes in them.
        UnsupportedError: a matrix is stored neither as fp32, fp16 nor bf16.
    """
    _check_wanted(wanted)
    for checkpoint in (tuned, base):
        refuse_other_storage(checkpoint, checkpoint.path)
        _refuse_storage(checkpoint)
    paired = _paired(tuned, base)
    linear = _linear(paired, tuned)
    orientation = Orientation(architecture_of(tuned.config, tuned.tensors))
    matrices = {
        name.removesuffix(SUFFIX): Pair(paired[name].tuned, paired[name].base, bool(orientation.transposed(name)))
        for name in sorted(linear)
    }
    most = max((min(pair.tuned.shape) for pair in matrices.values()), default=0)
    if wanted.rank is not None and wanted.rank > most:
        raise LoratoolError(f"the rank is {wanted.rank}, but no matrix has more than {most}; give a smaller --rank")
    others = {name: pair for name, pair in sorted(paired.items()) if name not in linear}
    heads = architecture_of(tuned.config, tuned.tensors).weights(Role.HEAD)
    tied_ones = {name for name in others if name in heads or is_tied_embedding(name, tuned)}
    return ExtractPlan(matrices, others, frozenset(tied_ones))


def extract_into(draft: Draft, plan: ExtractPlan, wanted: Wanted, *, keep_full: bool = False,
                 progress: Callable[[int], None] = lambda count: None) -> Extraction:  # fmt: skip
    """Put the factors of every changed linear layer into `draft`, in fp32, for a scaling of 1.

    With `keep_full`, a module is kept whole if one of its other tensors changed (a norm, an embedding, a bias).
    `progress` is called with the number of bytes of the tuned model compared.

    Raises:
        CheckpointError: a file is damaged, or holds NaN or infinity.
        UnsupportedError: PEFT's layout cannot hold a tensor that `keep_full` asks for.
        LoratoolError: no linear layer changed.
    """
    changed = []
    for name, pair in plan.others.items():
        changed += [name] if _changed(pair) else []
        progress(pair.tuned.nbytes)
    kept = _whole_modules(changed, plan) if keep_full else {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    randomized: list[str] = []
    energy = lost = 0.0
    for module, pair in plan.linear.items():
        whole = f"{module}{SUFFIX}" in kept
        found = None if whole else fit(Difference(pair.tuned, pair.base), wanted, _seed(module))
        if found is not None:
            a, b = (found.b.T, found.a.T) if pair.transposed else (found.a, found.b)
            draft.put(module, a, b)
            ranks[module], errors[module] = len(a), math.sqrt(found.lost / found.energy)
            energy, lost = energy + found.energy, lost + found.lost
            randomized += [module] if found.randomized else []
        progress(pair.tuned.nbytes)
    if not ranks:
        other = f"; {len(changed)} other tensors did, such as {quoted(changed[0])}" if changed else ""
        raise LoratoolError(
            f"no linear layer differs from the base{other}: there is nothing to extract; is it the tuned model?"
        )
    return Extraction(
        ranks,
        errors,
        math.sqrt(lost / energy),
        tuple(randomized),
        unchanged=sum(module not in ranks and f"{module}{SUFFIX}" not in kept for module in plan.linear),
        left_out=() if keep_full else tuple(changed),
        kept=kept,
    )


def _check_wanted(wanted: Wanted) -> None:
    if (wanted.rank is None) == (wanted.share is None):
        raise LoratoolError("--rank or --energy decides the size of the adapter; give one of them")
    if wanted.rank is not None and wanted.rank < 1:
        raise LoratoolError(f"the rank is {wanted.rank}; give one of at least 1")
    if wanted.share is not None and not 0 < wanted.share <= 1:
        raise LoratoolError(f"the energy is {wanted.share:g}; give a share above 0 and at most 1, such as 0.95")


def _paired(tuned: Checkpoint, base: Checkpoint) -> dict[str, Pair]:
    """Pair each tensor of the tuned model with one of the base. Prefixes of names may differ, as in adapters."""
    landing = _landing(tuned, base)
    places = dict.fromkeys(tuned.tensors, None) | {name: name for name in tuned.tensors if name in base.tensors}
    if landing is not None:
        places = {name: landing.place(name, base.tensors) for name in tuned.tensors}
    _refuse_missing([name for name, place in places.items() if place is None], tuned, base)
    reached = set(places.values())
    if len(reached - {None}) < sum(place is not None for place in places.values()):
        raise PlacementError(
            f"two tensors of {quoted(tuned.path)} match one tensor of the base; give both models the same tensor names"
        )
    _refuse_missing([name for name in base.tensors if name not in reached], base, tuned)
    pairs = {
        name: Pair(tuned.tensors[name], base.tensors[place]) for name, place in places.items() if place is not None
    }
    for pair in pairs.values():
        if pair.tuned.shape != pair.base.shape:
            raise PlacementError(
                f"{quoted(pair.tuned.name)} has shape {list(pair.tuned.shape)} in the tuned model and "
                f"{list(pair.base.shape)} in the base; "
                + misfit_advice(
                    pair.base.name, pair.tuned.shape, pair.base.shape, architecture_of(base.config, base.tensors)
                )
            )
    return pairs


def _landing(tuned: Checkpoint, base: Checkpoint) -> Landing | None:
    """The replacements of prefixes that turn the tuned model's names into the base's; None if there are none."""
    heads = architecture_of(tuned.config, tuned.tensors).weights(Role.HEAD)
    matrices = {
        name: info.shape
        for name, info in tuned.tensors.items()
        if name.endswith(SUFFIX) and len(info.shape) == 2 and name not in heads
    }
    try:
        landing = land(matrices, architecture_of(base.config, base.tensors), str(tuned.path))
        return None if landing.by_tables else landing
    except PlacementError:
        return None  # `_refuse_missing` names the tensors


def _refuse_missing(names: list[str], here: Checkpoint, there: Checkpoint) -> None:
    """Raise PlacementError for tensors that only one model has, except tied heads and buffers."""
    heads = tied(set(architecture_of(here.config, here.tensors).weights(Role.HEAD)).intersection(names), here)
    missing = [name for name in names if name not in heads and not name.endswith(BUFFERS)]
    if missing:
        near = nearest(missing[0], there.tensors, 1)
        raise PlacementError(
            f"{quoted(here.path)} has {len(missing)} tensors that {quoted(there.path)} lacks, such as {quoted(missing[0])}"
            f"{f' (nearest: {quoted(near[0])})' if near else ''}; is it the right base?"
        )


def _linear(paired: Mapping[str, Pair], tuned: Checkpoint) -> set[str]:
    """The tensors that a LoRA can change: matrices of linear layers that are not tied to an embedding."""
    architecture = architecture_of(tuned.config, tuned.tensors)
    matrices = {
        name
        for name, pair in paired.items()
        if len(pair.tuned.shape) == 2 and name.endswith(SUFFIX) and not architecture.is_embedding(name)
    }
    return matrices - tied(matrices, tuned).keys()


def _refuse_storage(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError if a weight is stored neither as fp32, fp16 nor bf16."""
    for name, info in checkpoint.tensors.items():
        weight = stored_weight(checkpoint, name) if name.endswith(SUFFIX) else None
        if name.endswith(SUFFIX) and (weight is None or not is_dense(weight)):
            raise UnsupportedError(
                f"{quoted(name)} in {quoted(info.file)} is stored as {weight.storage if weight else info.dtype}; loratool "
                "extracts from fp32, fp16 and bf16 models: take the model that it was quantized from"
            )


def _changed(pair: Pair) -> bool:
    """Whether any value of a tensor differs, even if the two models store it in different dtypes."""
    if pair.tuned.dtype == pair.base.dtype:
        return not _same_bytes(pair.tuned, pair.base)
    if not {pair.tuned.dtype, pair.base.dtype} <= set(DENSE):
        return True
    return Difference(pair.tuned, pair.base).energy() > 0


def _whole_modules(changed: Iterable[str], plan: ExtractPlan) -> dict[str, Replacement]:
    """Return all tensors of the modules that hold a `changed` tensor, as PEFT's ``modules_to_save`` keeps them.

    Raises:
        UnsupportedError: PEFT cannot keep one of these modules whole.
    """
    everything = {name: pair.tuned for name, pair in plan.others.items()}
    everything |= {f"{module}{SUFFIX}": pair.tuned for module, pair in plan.linear.items()}
    kept: dict[str, TensorInfo] = {}
    for name in changed:
        module = name.rpartition(".")[0]
        whole = {own: info for own, info in everything.items() if own.startswith(f"{module}.")}
        reason = None
        if name in plan.tied:
            reason = "is tied to the output head, and keeping it whole would break the tie"
        elif not module or any("." in own[len(module) + 1 :] for own in whole):
            reason = "belongs to no module that can be kept by itself"
        elif any(info.dtype not in DENSE for info in whole.values()):
            reason = "or its module is stored neither as fp32, fp16 nor bf16"
        if reason:
            raise UnsupportedError(
                f"{quoted(name)} changed and cannot be kept in modules_to_save: it {reason}; leave --keep-full out"
            )
        kept |= whole
    return {name: Replacement(info) for name, info in sorted(kept.items())}


def _same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    with opened({left.file, right.file}) as files:
        for start in range(0, left.nbytes, COMPARED_BYTES):
            count = min(COMPARED_BYTES, left.nbytes - start)
            parts = bytearray(count), bytearray(count)
            for part, info in zip(parts, (left, right), strict=True):
                read_exactly(files[info.file], memoryview(part), info.start + start)
            if parts[0] != parts[1]:
                return False
    return True


def _seed(module: str) -> int:
    """A random seed derived from the module's name, so that the same models give the same bytes."""
    return int.from_bytes(blake3(module.encode()).digest(8), "little") >> 1
