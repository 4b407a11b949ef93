"""A parameter that changes, with its updates, in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loratool.merging.plan import Target
from loratool.merging.region import Region, RegionalUpdate
from loratool.weights.coarse.feedback import Feedback
from loratool.weights.rounding import Rounding
from loratool.weights.stored import LoadedWeight, StoredWeight


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A parameter and its updates, in order, loaded onto one device.

    Attributes:
        weight: the parameter as it is stored.
        stored: the same, able to decode and encode its blocks.
        adds: whether no update depends on the weights.
        rounding: how to round: seeded, and error-compensated if there are calibration inputs.
        scalable: whether all updates take a weight other than 1.
    """

    weight: StoredWeight
    stored: LoadedWeight
    updates: tuple[RegionalUpdate, ...]
    adds: bool
    rounding: Rounding
    scalable: bool = True

    @classmethod
    def of(cls, target: Target, device: str) -> LoadedTarget:
        """Load a target of a plan.

        Raises:
            AdapterError, CheckpointError: a tensor of the adapter or of the model is damaged.
        """
        stored, updates = target.weight.load(device), []
        for planned in target.updates:
            region = Region.of(planned.view, target.weight)
            loaded = planned.update.load(transposed=region.transposed, weight=planned.weight, device=device)
            updates.append(RegionalUpdate(loaded, region))
        adds = all(not planned.update.needs_weight for planned in target.updates)
        rounding = Rounding(target.seed, all_carry=not adds)
        scalable = all(planned.update.scalable for planned in target.updates)
        return cls(target.weight, stored, tuple(updates), adds, _calibrated(rounding, target, device), scalable)


def _calibrated(rounding: Rounding, target: Target, device: str) -> Rounding:
    """Return a rounding with the error compensation of the target's calibration inputs, if it has any."""
    import numpy as np
    import torch

    if target.inputs is None:
        return rounding
    inputs = torch.from_numpy(np.load(target.inputs)).to(device)
    if target.weight.turned:  # a block covers only some of the inputs
        return replace(rounding, feedback=lambda few: Feedback(inputs[:, few.start : few.stop]))
    return replace(rounding, feedback=Feedback(inputs))
