"""`loratool.verify_delivery`: measure what a model that any tool wrote carries of adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, NotFoundError, quoted
from loratool.library.merges.sources import find_adapters, find_base
from loratool.library.places.holding import hold
from loratool.library.recording.opening import open_registry
from loratool.library.reporting.progress import Progress, Silent
from loratool.library.resolving.adapter_spec import AdapterSpec, PathLike, with_weight
from loratool.library.resolving.resolve import resolve_at_rank, resolve_base
from loratool.merging.carried import measure_carried
from loratool.merging.delivery import Delivery
from loratool.merging.manifest import MANIFEST_NAME, Manifest, read_manifest
from loratool.merging.plan import WeightedAdapter
from registry import Registry


@dataclass(frozen=True, slots=True)
class CarriedAdapter:
    """An adapter, its weight, and the factor of its update, times that weight, that is in the model."""

    adapter: str
    weight: float
    share: float


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """What a model carries of adapters.

    Attributes:
        path: the model's folder or file.
        base: the base's folder or file.
        adapters: what is in the model of each.
        delivery: how much of all updates together the stored numbers carry.
        deliveries: the same for each parameter, by name.
        unchanged: the parameters that are as in the base.
    """

    path: Path
    base: Path
    adapters: tuple[CarriedAdapter, ...]
    delivery: Delivery
    deliveries: Mapping[str, Delivery]
    unchanged: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result for ``--json``."""
        return {
            "path": str(self.path),
            "base": str(self.base),
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "delivery": self.delivery.to_json(),
            "deliveries": {name: delivery.to_json() for name, delivery in self.deliveries.items()},
            "unchanged": list(self.unchanged),
        }


def verify_delivery(
    merged: PathLike,
    adapters: Sequence[AdapterSpec] | PathLike = (),
    base: PathLike | None = None,
    *,
    registry: str | None = None,
    progress: Progress | None = None,
) -> DeliveryResult:
    """Measure what a model carries of adapters, whichever tool merged them and in whichever storage.

    Args:
        merged: the model: a folder, a safetensors file, a catalogued name or a Hub id.
        adapters: each alone or as (adapter, weight); by default those that the manifest of a merge by loratool records.
        base: the model that they were merged into; by default the one that the manifest records.
        registry: SQLAlchemy URL of the catalogue, instead of the one in the home folder.
        progress: receives the number of bytes done.

    Raises:
        LoratoolError, registry.RegistryError: the message says what is wrong.
    """
    watcher = progress or Silent()
    specs = [with_weight(spec) for spec in ([adapters] if isinstance(adapters, str | os.PathLike) else adapters)]
    with open_registry(registry, read_only=True) as catalogue:
        path = resolve_base(merged, catalogue, watcher).path
        with hold(path, exclusive=False):
            checkpoint = Checkpoint.open(path)
            manifest = None if specs and base is not None else _manifest(checkpoint)
            origin = _base(base, checkpoint, manifest, catalogue, watcher)
            weighted = _adapters(specs, checkpoint, manifest, catalogue)
            with hold(origin.path, exclusive=False):
                watcher.begin("measuring", origin.nbytes)
                carried = measure_carried(weighted, origin, checkpoint, watcher.advance)
    if carried.delivery is None:
        raise LoratoolError("the adapter only replaces parameters, so there is no update to measure; compare the files")
    found = zip(weighted, carried.shares, strict=True)
    return DeliveryResult(
        path,
        origin.path,
        tuple(CarriedAdapter(each.adapter.name, each.weight, share) for each, share in found),
        carried.delivery,
        carried.deliveries,
        carried.unchanged,
    )


def _manifest(model: Checkpoint) -> Manifest:
    if not (model.folder / MANIFEST_NAME).is_file():
        raise NotFoundError(
            f"{quoted(model.path)} was not merged by loratool, so nothing records its base and adapters; give --base BASE "
            "and --adapter ADAPTER"
        )
    return read_manifest(model.folder)


def _base(name: PathLike | None, model: Checkpoint, manifest: Manifest | None, catalogue: Registry,
          watcher: Progress) -> Checkpoint:  # fmt: skip
    if name is not None:
        return resolve_base(name, catalogue, watcher).open()
    assert manifest is not None
    found = find_base(model, manifest, catalogue, watcher)
    if found is None:
        raise NotFoundError(
            f"the base {quoted(manifest.base_name)} of {quoted(model.path)} is not available; give --base BASE"
        )
    return found


def _adapters(specs: Sequence[tuple[PathLike, float]], model: Checkpoint, manifest: Manifest | None,
              catalogue: Registry) -> list[WeightedAdapter]:  # fmt: skip
    if specs:
        return [WeightedAdapter(resolve_at_rank(name, catalogue).adapter, weight) for name, weight in specs]
    assert manifest is not None
    found = find_adapters(model.folder, manifest, catalogue)
    return [
        WeightedAdapter(entry.restored(adapter), entry.weight)
        for entry, adapter in zip(manifest.adapters, found, strict=True)
    ]
