"""What a model that any tool wrote carries of adapters, measured against the base that they were merged into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from loratool.checkpoint.blocks import BLOCK_ROWS, read_exactly, row_blocks
from loratool.checkpoint.model import Checkpoint
from loratool.errors import CheckpointError, PlacementError, UnsupportedError, quoted
from loratool.merging.arithmetic import BlockArithmetic
from loratool.merging.delivery import Delivery, DeliveryCount
from loratool.merging.plan import Target, WeightedAdapter, plan_merge
from loratool.merging.stream import Progress, bytes_of, opened, stream
from loratool.weights.storages import refuse_other_storage, stored_weight
from loratool.weights.stored import StoredWeight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Carried:
    """What a model carries of adapters.

    Attributes:
        shares: for each adapter, the factor of its update that is in the model, by least squares: 1 if all of it is there.
        delivery: of all updates together; None if the adapters only replace parameters.
        deliveries: the same for each parameter, by name.
        unchanged: the names of those that are as in the base.
    """

    shares: tuple[float, ...]
    delivery: Delivery | None
    deliveries: Mapping[str, Delivery]
    unchanged: tuple[str, ...]


def measure_carried(adapters: Sequence[WeightedAdapter], base: Checkpoint, model: Checkpoint,
                    progress: Progress = lambda count: None) -> Carried:  # fmt: skip
    """Compare every parameter that the adapters change in `base` with the same one in `model`, whatever its storage.

    Parameters that an adapter replaces are left out.

    Raises:
        PlacementError: the adapters do not land on the base, or `model` lacks one of the parameters.
        UnsupportedError: a parameter is stored in a way that loratool cannot read, or transposed.
        CheckpointError, AdapterError: a file is damaged.
    """
    refuse_other_storage(model, model.path)
    targets = [
        target
        for target in plan_merge(adapters, base).targets
        if not all(planned.update.replaces for planned in target.updates)
    ]
    stored = {target.name: _same_parameter(target.weight, model) for target in targets}
    sums = {target.name: _Sums.of(len(adapters)) for target in targets}
    with opened({info.file for weight in stored.values() for info in weight.tensors}) as files:
        stream(
            targets,
            lambda target: _Comparison(target, stored[target.name], files, sums[target.name]),
            {},
            progress=progress,
        )
    counts = {name: each.delivery for name, each in sorted(sums.items())}
    deliveries = {name: count.delivery() for name, count in counts.items()}
    return Carried(
        _least_squares([each for _, each in sorted(sums.items())], len(adapters)),
        DeliveryCount.of_all(counts.values()).delivery() if counts else None,
        deliveries,
        tuple(name for name, delivery in deliveries.items() if not delivery.changed),
    )


def _same_parameter(weight: StoredWeight, model: Checkpoint) -> StoredWeight:
    """Return the parameter of the same name in the model, which must have the same shape."""
    found = stored_weight(model, weight.name)
    if found is None:
        raise PlacementError(
            f"{quoted(model.path)} has no {quoted(weight.name)}, which the adapter changes in the base; give the base that "
            "it was made from"
        )
    if found.shape != weight.shape or found.turned != weight.turned:
        raise UnsupportedError(
            f"{quoted(weight.name)} has shape {list(found.shape)} in {quoted(model.path)} and {list(weight.shape)} in the "
            "base, or is stored transposed; give the base that it was made from"
        )
    return found


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the blocks of one parameter.

    Attributes:
        delivery: of all updates together.
        products: the inner products of the updates of each two adapters.
        carried: the inner product of what changed with each adapter's updates.
    """

    delivery: DeliveryCount
    products: list[list[float]]
    carried: list[float]

    @classmethod
    def of(cls, adapters: int) -> Self:
        return cls(DeliveryCount(), [[0.0] * adapters for _ in range(adapters)], [0.0] * adapters)


class _Comparison(BlockArithmetic):
    """Compares one parameter of the base, whose blocks are read, with the same one of the model. Changes nothing."""

    def __init__(self, target: Target, model: StoredWeight, files: Mapping[Path, int], sums: _Sums) -> None:
        super().__init__(target, "cpu")
        self._model, self._files, self._sums = model, files, sums
        self._loaded = model.load("cpu")
        self._adapters = [planned.adapter for planned in target.updates]
        step = math.lcm(self.weight.row_step, model.row_step, BLOCK_ROWS)
        self._blocks = list(row_blocks(self.weight.rows, self.weight.columns * 4, least=step))

    @property
    def measures(self) -> bool:
        return any(update.measures_whole for update in self._updates)

    def change(self, rows: range, parts: tuple[torch.Tensor, ...]) -> None:
        import torch

        before = torch.empty(len(rows), self.weight.columns)
        self.stored.decode(rows, parts, before)
        after = torch.empty_like(before)
        self._loaded.decode(rows, self._read(rows), after)
        if not torch.isfinite(after).all() and torch.isfinite(before).all():
            info = self._model.tensors[0]
            raise CheckpointError(
                f"{quoted(info.name)} in {quoted(info.file)} holds NaN or infinity where the base holds numbers, so nothing can "
                "be measured; merge it again"
            )
        change, present = after - before, sorted(set(self._adapters))
        deltas = {adapter: self._updated(before, rows, adapter).sub_(before) for adapter in present}
        for one, delta in deltas.items():
            self._sums.carried[one] += _dot(change, delta)
            for other in present:
                self._sums.products[one][other] += _dot(delta, deltas[other])
        self._sums.delivery.add(before, self._updated(before, rows), after)

    def _read(self, rows: range) -> tuple[torch.Tensor, ...]:
        """Return the bytes of the same rows in the model."""
        import torch

        parts = []
        for info, start, end in self._model.extents(rows):
            part = torch.empty(end - start, dtype=torch.uint8)
            read_exactly(self._files[info.file], bytes_of(part), start)
            parts.append(part)
        return tuple(parts)

    def _updated(self, before: torch.Tensor, rows: range, adapter: int | None = None) -> torch.Tensor:
        """Return the block with all updates, or with those of one adapter."""
        import torch

        block, scratch = before.clone(), torch.empty_like(before)
        chosen = [each for each, index in zip(self._updates, self._adapters, strict=True) if adapter in (None, index)]
        for update in chosen:
            if update.measures_block:
                update.measure(block, rows, scratch)
        for update in chosen:
            update.apply(block, rows, scratch)
        return block


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _least_squares(sums: Sequence[_Sums], adapters: int) -> tuple[float, ...]:
    """Return the factors of the adapters' updates whose sum is nearest to what changed; 0 for one that changes nothing."""
    import numpy as np

    products, carried = np.zeros((adapters, adapters)), np.zeros(adapters)
    for each in sums:
        products += np.array(each.products)
        carried += np.array(each.carried)
    return tuple(round(float(share), 6) for share in np.linalg.lstsq(products, carried, rcond=None)[0])
