"""Plan a merge from headers alone: which update lands on which stored matrix. All of it is checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from loratool.architecture import (
    WHOLE,
    Architecture,
    Orientation,
    Place,
    Role,
    View,
    any_model,
    architecture_of,
    module_of,
)
from loratool.checkpoint.dtypes import DENSE
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, PlacementError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.landing import Landing, land
from loratool.formats.lora_config import LoraConfig
from loratool.formats.names import is_tied_head
from loratool.formats.replacements import lost_biases, refuse_incomplete
from loratool.merging.changed_files import FileChanges
from loratool.merging.landing_notes import landing_notes, left_out, other_weights
from loratool.merging.own_base import part_on_own_base, refuse_copy
from loratool.merging.seeds import seed_of, seed_of_adapters
from loratool.merging.ties import (
    goes_with_embedding,
    how_to_untie,
    is_tied_embedding,
    keeps_tie,
    refuse_tied,
    stored_twin,
    tied_copies,
)
from loratool.merging.vocabulary import how_to_add_classifier, misfit_advice
from loratool.updates import BiasUpdate, DrawnUpdate, OutputwiseUpdate, Places, RowsUpdate, Update
from loratool.updates.based import Based
from loratool.updates.expert_factors import Stacked
from loratool.updates.shapes import ANY, fits, sized, words
from loratool.updates.wrapper import whole_of
from loratool.weights.storage import Model
from loratool.weights.storages import quantize_hint, refuse_other_storage, stored_weight, titles
from loratool.weights.stored import StoredWeight


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter and the factor that multiplies its whole update."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PlannedUpdate:
    """One update for a tensor: the index of its `adapter` in the plan, and that adapter's name for the parameter.

    `view` is the part of the stored parameter that the update sees as a matrix (out_features, in_features).
    """

    adapter: int
    parameter: str
    update: Update
    weight: float
    view: View = WHOLE


@dataclass(frozen=True, slots=True)
class Target:
    """One stored parameter that changes.

    `seed`, below 2**64, seeds stochastic rounding in coarse storages. In a calibrated merge, `inputs` is a ``.npy`` file with
    sample inputs of the matrix, fp32, (tokens, in_features).
    """

    weight: StoredWeight
    updates: tuple[PlannedUpdate, ...]
    seed: int = 0
    inputs: Path | None = None

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def nbytes(self) -> int:
        """Size of the matrix in the checkpoint, in bytes."""
        return sum(info.nbytes for info in self.weight.tensors)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The methods of its updates. One that an adapter uses for several parts is counted once."""
        return tuple(kind for _, kind in dict.fromkeys((each.adapter, each.update.kind) for each in self.updates))

    def on(self, weight: StoredWeight, *, turned: bool = False) -> Target:
        """Return the same updates on another parameter, which is the transpose of this one's if `turned`."""
        views = (planned.view.turned() if turned else planned.view for planned in self.updates)
        updates = tuple(replace(planned, view=view) for planned, view in zip(self.updates, views, strict=True))
        return replace(self, weight=weight, updates=updates)

    def upright(self, weight: StoredWeight) -> Target:
        """Return the same updates on another parameter, stored as (out_features, in_features)."""
        upright = (replace(each, view=replace(each.view, transposed=False)) for each in self.updates)
        return replace(self, weight=weight, updates=tuple(upright))


@dataclass(frozen=True)
class MergePlan:
    """A complete plan of a merge.

    Attributes:
        base: the checkpoint to merge into.
        adapters: the adapters, in the order in which their updates are added.
        targets: the matrices that change, by name.
        notes: what a user should know before the merge.
        seed: the seed of all stochastic rounding, 64 hexadecimal digits.
        calibration: BLAKE3 of the calibration text; "" without calibration.
        files: the files that replace the base's beside the weights.
    """

    base: Checkpoint
    adapters: tuple[WeightedAdapter, ...]
    targets: tuple[Target, ...]
    notes: tuple[str, ...]
    seed: str = ""
    calibration: str = ""
    files: FileChanges = field(default_factory=FileChanges)

    @property
    def touched_bytes(self) -> int:
        """Bytes of the tensors that change."""
        return sum(target.nbytes for target in self.targets)

    @cached_property
    def touched(self) -> frozenset[str]:
        """The names of all tensors that change."""
        return frozenset(info.name for target in self.targets for info in target.weight.tensors)


def plan_merge(adapters: Sequence[WeightedAdapter], base: Checkpoint, seed: str | None = None) -> MergePlan:
    """Plan a merge into the model on disk `base`: `plan_targets`, with what concerns its files.

    `seed` is the seed of an earlier merge to repeat; by default it is derived from the adapters.

    Raises:
        UnsupportedError: the base has a storage that loratool cannot write.
        PlacementError, LoratoolError: see `plan_targets`.
    """
    _refuse_repeats(adapters)
    refuse_other_storage(base, base.path)
    seed = seed or seed_of_adapters([(each.adapter.sha256, each.weight) for each in adapters])
    targets, landed = plan_targets(adapters, base, seed)
    notes = [note for weighted in adapters for note in weighted.adapter.notes] + other_weights(base)
    return MergePlan(base, tuple(adapters), targets, (*notes, *landed), seed)


def plan_targets(adapters: Sequence[WeightedAdapter], base: Model, seed: str) -> tuple[tuple[Target, ...], list[str]]:
    """Find the stored parameter that each update of each adapter lands on in `base`, on disk or in memory.

    Returns the parameters that change, and notes on where the adapters landed. `seed` seeds all stochastic rounding.

    Raises:
        PlacementError: a module lands nowhere, on a matrix of another shape, or on a tied one.
        UnsupportedError: it lands on a matrix whose storage loratool cannot write.
        LoratoolError: an update does not support its weight.
    """
    architecture = architecture_of(base.config, base.tensors)
    landings = [_landing(weighted.adapter, architecture) for weighted in adapters]
    arriving: dict[str, list[PlannedUpdate]] = {}
    both: set[str] = set()  # tied tensors that change with their embedding
    for index, (weighted, landing) in enumerate(zip(adapters, landings, strict=True)):
        for parameter, update in weighted.adapter.changes.items():
            if goes_with_embedding(weighted.adapter, parameter, base):
                continue
            for place in landing.tensors[parameter]:
                if place.name not in base.tensors and isinstance(update, BiasUpdate) and update.only_if_present:
                    continue
                twin = _twin(place, update, base, architecture)
                if twin is not None:
                    if _holds_twin(twin, update, weighted.adapter, landing):
                        continue
                    place = replace(place, name=twin)
                refuse_partial(place, parameter, weighted.adapter)
                based = part_on_own_base(parameter, update, weighted.adapter, place, base)
                planned = PlannedUpdate(index, parameter, based, weighted.weight, place.view)
                is_shared = isinstance(update, RowsUpdate) or keeps_tie(weighted.adapter, parameter)
                copies = tied_copies(place.name, base) if is_shared else ()
                both.update(copies)
                for name in (place.name, *copies):
                    arriving.setdefault(name, []).append(planned)
    outputs = {
        name: {planned.update.shape[0] for planned in updates if planned.update.shape[0] != ANY}
        for name, updates in arriving.items()
        if all(planned.view.is_whole and _leads(planned.update) for planned in updates)
    }
    orientation = Orientation(architecture, outputs)
    targets = tuple(
        replace(_target(name, tuple(updates), adapters, base, orientation), seed=seed_of(seed, name))
        for name, updates in sorted(arriving.items(), key=_in_order)
    )
    for index, (weighted, landing) in enumerate(zip(adapters, landings, strict=True)):
        targets = _drawn(
            index, weighted.adapter, targets, left_out(weighted.adapter, landing, orientation.architecture)
        )
        refuse_incomplete(weighted.adapter, landing.names, base.tensors)
    refuse_tied([target.name for target in targets if target.name not in both], base, orientation.architecture)
    notes: list[str] = []
    for weighted, landing in zip(adapters, landings, strict=True):
        notes += lost_biases(weighted.adapter, landing.names, base.tensors)
        notes += landing_notes(weighted.adapter, landing, orientation.architecture)
    return targets, notes


def _twin(place: Place, update: Update, base: Model, architecture: Architecture) -> str | None:
    """Return the tensor that a whole parameter lands on which the base stores under another name only."""
    return stored_twin(place.name, base, architecture) if update.replaces and place.name not in base.tensors else None


def _holds_twin(twin: str, update: Update, adapter: Adapter, landing: Landing) -> bool:
    """Return whether an adapter holds a parameter under both of its names, with equal bytes.

    Raises:
        PlacementError: it holds two versions.
    """
    own = next((name for name, places in landing.names.items() if twin in places), None)
    if own is None:
        return False
    (first,), (second,) = (each.tensors.values() for each in (adapter.changes[own], update))
    if not adapter.changes[own].replaces or hash_tensor(first) != hash_tensor(second):
        raise PlacementError(
            f"{quoted(adapter.name)} holds {quoted(first.name)} and {quoted(second.name)}, two versions of {quoted(twin)}, "
            "which the base stores once; is it the right base?"
        )
    return True


def _landing(adapter: Adapter, architecture: Architecture) -> Landing:
    """Return where all parameters of an adapter land. Whole ones, vectors and rows follow the matrices, if there are any."""
    stacks = {name: update for name, update in adapter.changes.items() if isinstance(update, Stacked)}
    shapes = {name: update.shape for name, update in adapter.changes.items() if name not in stacks}
    leading = {name: shape for name, shape in shapes.items() if _leads(adapter.changes[name])}
    leading = leading if leading or stacks else shapes
    following = {name: shape for name, shape in shapes.items() if name not in leading}
    return land(leading, architecture, adapter.name, following, stacks)


def _leads(update: Update) -> bool:
    """Return whether an update shows by its shape where its adapter lands; the others follow."""
    return not update.replaces and not isinstance(update, RowsUpdate) and len(update.shape) > 1


def refuse_partial(place: Place, parameter: str, adapter: Adapter) -> None:
    """Raise UnsupportedError if a parameter that is held whole would replace a part of a stored one."""
    if adapter.changes[parameter].replaces and not (place.own == WHOLE and place.view.is_whole):
        raise UnsupportedError(
            f"{quoted(adapter.name)} replaces {quoted(parameter)}, which is not one tensor of the base but has parts, as in "
            f"{quoted(place.name)}; loratool does not compute that yet"
        )


def _refuse_repeats(adapters: Sequence[WeightedAdapter]) -> None:
    if not adapters:
        raise LoratoolError("there is nothing to merge; name at least one adapter")
    seen: set[tuple[str, tuple[float, ...]]] = set()
    for weighted in adapters:
        scalings = tuple(update.scaling for update in weighted.adapter.ranked.values())
        if (weighted.adapter.sha256, scalings) in seen:
            raise LoratoolError(
                f"{quoted(weighted.adapter.name)} is given twice; give it once, with the sum of the weights"
            )
        seen.add((weighted.adapter.sha256, scalings))


def _target(name: str, updates: tuple[PlannedUpdate, ...], adapters: Sequence[WeightedAdapter],
            base: Model, orientation: Orientation) -> Target:  # fmt: skip
    """Check the updates that land on the stored tensor `name`, and return them as a target."""
    for planned in updates:
        _refuse_weight(planned, adapters[planned.adapter].adapter)
    replacing = next((planned for planned in updates if planned.update.replaces), None)
    if replacing is not None:
        return _replaced(name, replacing, updates, adapters, base)
    weight = stored_weight(base, name)
    source = adapters[updates[0].adapter].adapter
    own, first = module_of(updates[0].parameter), updates[0].update
    info = base.tensors.get(name)
    if info is None:
        raise PlacementError(
            f"{quoted(source.name)} changes {quoted(updates[0].parameter)} by {first.kind}, and the base has no such parameter, "
            "so PEFT could not merge it either; is it the right base?"
        )
    if weight is None or not weight.shape:
        raise UnsupportedError(
            f"{quoted(own)} of {quoted(source.name)} lands on {quoted(name)}, which is stored as "
            f"{info.dtype} {list(info.shape)}; loratool changes {titles()} weights"
        )
    _refuse_beside(name, weight.shape, updates, adapters)
    if isinstance(first, Based):
        refuse_copy(first, weight, source)
        first = first.update
    if isinstance(first, RowsUpdate):
        return _rows_target(weight, first, updates, source, orientation.architecture)
    if is_tied_embedding(name, base):
        raise PlacementError(
            f"{quoted(own)} of {quoted(source.name)} lands on the embedding {quoted(name)}, which the base ties to its output "
            f"head; {how_to_untie(base)}"
        )
    if all(planned.view.expert is None for planned in updates):
        weight = weight.by_output()
        transposed = _is_transposed(name, weight, orientation, fan_in_fan_out=source.settings.fan_in_fan_out)
        updates = tuple(replace(each, view=replace(each.view, transposed=transposed)) for each in updates)
    for planned in updates:
        _refuse_transposed_parameter(planned, name, adapters[planned.adapter].adapter)
        fitting = planned.view.shape_in(weight.shape)
        if not fits(planned.update.shape, fitting):
            raise PlacementError(
                f"{quoted(module_of(planned.parameter))} of {quoted(adapters[planned.adapter].adapter.name)} fits a matrix of "
                f"shape {words(planned.update.shape)}, but {quoted(name)} has {list(fitting)}; "
                + misfit_advice(name, planned.update.shape, fitting, orientation.architecture)
            )
        _refuse_turned(name, planned, weight, adapters[planned.adapter].adapter)
    updates = tuple(replace(each, update=sized(each.update, each.view.shape_in(weight.shape))) for each in updates)
    return Target(weight, updates)


def _refuse_turned(name: str, planned: PlannedUpdate, weight: StoredWeight, adapter: Adapter) -> None:
    """Raise UnsupportedError if an update needs all inputs of an output, and blocks of the stored matrix do not hold them."""
    update = planned.update
    if isinstance(update, OutputwiseUpdate) and update.needs_outputs and planned.view.transposed != weight.turned:
        raise UnsupportedError(
            f"{quoted(module_of(planned.parameter))} of {quoted(adapter.name)} is {update.kind}, and {quoted(name)} is stored as "
            "(in_features, out_features): loratool does not compute that; merge it with PEFT into the dense base"
        )


def _drawn(index: int, adapter: Adapter, targets: tuple[Target, ...], without: Sequence[str]) -> tuple[Target, ...]:
    """Tell the updates of one adapter whose numbers are drawn for all of its parameters which these are.

    Raises:
        PlacementError: the adapter lacks tensors of some of the modules `without`, so that these are unknown.
    """
    all_of = [(target, planned) for target in targets for planned in target.updates if planned.adapter == index]
    drawn = [
        update for update in (whole_of(planned.update) for _, planned in all_of) if isinstance(update, DrawnUpdate)
    ]
    if not drawn:
        return targets
    if without:
        raise PlacementError(
            f"{quoted(adapter.name)} does not hold its projections, drawn for the largest of all its modules, and lacks "
            f"the tensors of {quoted(without[0])}, which it targets too; save it again with its projections (save_projection)"
        )
    outputs, inputs = (max(update.shape[axis] for update in drawn) for axis in (0, 1))
    places = Places(outputs, inputs, frozenset(target.weight.dtype for target, _ in all_of))
    return tuple(
        replace(target, updates=tuple(
            replace(each, update=each.update.among(places))
            if each.adapter == index and isinstance(each.update, DrawnUpdate) else each
            for each in target.updates
        ))
        for target in targets
    )  # fmt: skip


def _is_transposed(name: str, weight: StoredWeight, orientation: Orientation, *, fan_in_fan_out: bool) -> bool:
    """Return whether updates see the transpose of a parameter. An embedding (tokens, features) leads from tokens to features."""
    if len(weight.shape) != 2:
        return False
    if orientation.architecture.is_embedding(name):
        return True
    stored = False if weight.is_oriented else orientation.transposed(name)
    return fan_in_fan_out if stored is None else stored


def _rows_target(weight: StoredWeight, update: RowsUpdate, updates: tuple[PlannedUpdate, ...], source: Adapter,
                 architecture: Architecture) -> Target:  # fmt: skip
    """Return the target of an update of some rows of a matrix, which has one row for each token."""
    tokens, width = weight.shape if len(weight.shape) == len(update.shape) else (0, 0)
    if update.shape[1] != width:
        raise PlacementError(
            f"{quoted(source.name)} replaces rows of {quoted(weight.name)} by rows of {update.shape[1]} numbers, and the base's "
            f"have {width}; is it the right base?"
        )
    if update.shape[0] > tokens:
        raise PlacementError(
            f"{quoted(source.name)} replaces row {update.shape[0] - 1} of {quoted(weight.name)}, which has {tokens} rows; "
            + misfit_advice(weight.name, update.shape, weight.shape, architecture)
        )
    if not weight.is_replaceable:
        raise UnsupportedError(
            f"{quoted(source.name)} replaces rows of {quoted(weight.name)}, which the base stores {weight.words}; merge into the "
            f"dense base instead{quantize_hint(weight)}"
        )
    return Target(weight, tuple(replace(each, view=WHOLE) for each in updates))


def _refuse_transposed_parameter(planned: PlannedUpdate, name: str, adapter: Adapter) -> None:
    """Raise UnsupportedError if PEFT would add an update to a matrix as it is stored, which is (in_features, out_features)."""
    settings = adapter.settings
    targeted = settings.target_parameters if isinstance(settings, LoraConfig) else ()
    parameter = f".{planned.parameter}"
    if (
        planned.view.transposed
        and planned.view.expert is None
        and any(parameter.endswith(f".{each}") for each in targeted)
    ):
        raise UnsupportedError(
            f"{quoted(adapter.name)} changes {quoted(planned.parameter)} by target_parameters, and {quoted(name)} is stored as "
            "(in_features, out_features): loratool does not compute that yet; merge it with PEFT"
        )


def _refuse_beside(name: str, shape: tuple[int, ...], updates: Sequence[PlannedUpdate],
                   adapters: Sequence[WeightedAdapter]) -> None:  # fmt: skip
    """Raise PlacementError if an update puts numbers of its own in the place of W, and another one changes W too."""
    for planned in updates:
        own = isinstance(planned.update, Based | RowsUpdate)
        if own and any(other is not planned and other.view.overlaps(planned.view, shape) for other in updates):
            raise PlacementError(
                f"{quoted(adapters[planned.adapter].adapter.name)} changes {quoted(name)} by {planned.update.kind}, which takes "
                "the place of its numbers, and another update changes it too; merge one of them, and then the other into the "
                "result"
            )


def _refuse_weight(planned: PlannedUpdate, adapter: Adapter) -> None:
    """Raise LoratoolError if the update does not support its weight."""
    if planned.update.scalable or planned.weight == 1:
        return
    what = (
        "replaces whole tensors (modules_to_save), which needs a weight of 1"
        if planned.update.replaces
        else f"changes {quoted(planned.parameter)} by {planned.update.kind}, which needs a weight of 1"
    )
    raise LoratoolError(f"{quoted(adapter.name)} {what}; leave the weight {planned.weight:g} out")


def _replaced(name: str, replacing: PlannedUpdate, updates: Sequence[PlannedUpdate],
              adapters: Sequence[WeightedAdapter], base: Model) -> Target:  # fmt: skip
    """Return the target of an update that replaces the whole stored tensor `name`, whatever its shape."""
    adapter, own, found = adapters[replacing.adapter].adapter, replacing.parameter, base.tensors.get(name)
    shape, (tensor,) = replacing.update.shape, replacing.update.tensors.values()
    weight = stored_weight(base, name)
    if weight is not None and not weight.is_replaceable:
        raise UnsupportedError(
            f"{quoted(adapter.name)} replaces {quoted(own)}, which the base stores {weight.words}; merge into the "
            f"dense base instead{quantize_hint(weight)}"
        )
    if found is None or found.shape != shape:
        there = f"which has {list(found.shape)} there" if found else "which the base lacks"
        tied = found is None and is_tied_head(own, base.tensors)
        advice = f"it seems to tie it to its input embedding: {how_to_untie(base)}" if tied else "is it the right base?"
        if found is None and any_model().role(own) is Role.CLASSIFIER:
            advice = how_to_add_classifier(adapter.config.get("task_type"), shape[0] if shape else 1)
        if found is not None:
            advice = misfit_advice(name, shape, found.shape, architecture_of(base.config, base.tensors))
        raise PlacementError(
            f"{quoted(adapter.name)} replaces {quoted(own)} by a tensor of shape {list(shape)}, {there}; {advice}"
        )
    if len(updates) > 1:
        raise PlacementError(
            f"{quoted(adapter.name)} replaces {quoted(name)}, which another update changes as well; merge one of them"
        )
    if is_tied_embedding(name, base) and not keeps_tie(adapter, own):
        raise PlacementError(
            f"{quoted(adapter.name)} replaces the embedding {quoted(name)}, which the base ties to its output head; "
            f"{how_to_untie(base)}"
        )
    if weight is None or tensor.dtype not in DENSE:
        raise UnsupportedError(
            f"{quoted(own)} of {quoted(adapter.name)} is {tensor.dtype} and replaces {quoted(name)}, stored as "
            f"{found.dtype}; loratool replaces fp32, fp16 and bf16 tensors by such"
        )
    return Target(weight, (replace(replacing, view=WHOLE),))


def _in_order(arriving: tuple[str, Sequence[PlannedUpdate]]) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Return a sort key that puts replaced parameters after changed ones, each in natural order."""
    name, updates = arriving
    return any(planned.update.replaces for planned in updates), _natural(name)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))
