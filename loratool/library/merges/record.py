"""Records of merges in the catalogue, and the expected time of a merge from earlier records."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Final

from loratool.library.merges.result import MergeResult
from loratool.library.recording.promised import Promised
from loratool.merging.plan import MergePlan
from registry import Registry, RegistryError

START_SECONDS: Final = 2.0
USUAL_BYTES_PER_SECOND: Final = 5e8
"""Expected speed of a merge if none was recorded, in bytes per second after `START_SECONDS`."""


def recorded(result: MergeResult, catalogue: Registry, promised: Promised | None = None) -> MergeResult:
    """Record the merge and return its result.

    Since the model is written, a catalogue that is busy, full or another user's gives only a note.
    """
    try:
        with catalogue.for_writing() as writable:
            _record(result, writable)
    except RegistryError as error:
        if promised is not None:
            promised.postpone(error)
        return replace(
            result, notes=(*result.notes, f"the merge is done but the catalogue does not know of it: {error}")
        )
    return result


def _record(result: MergeResult, catalogue: Registry) -> None:
    catalogue.merges.record(
        result.out.absolute(),
        base_fingerprint=str(result.base_fingerprint),
        merged=result.adapters,
        output_fingerprint=result.output_fingerprint,
        undo_file=None if result.undo_file is None else result.undo_file.absolute(),
        in_place=result.in_place,
        options={
            "seconds": result.seconds,
            **({} if result.conversion is None else result.conversion.change.to_options()),
            **({} if result.delivery is None else {"delivery": result.delivery.to_json()}),
            "size_bytes": result.plan.touched_bytes if result.in_place else result.plan.base.nbytes,
        },
    )


def expected_seconds(plan: MergePlan, catalogue: Registry, *, in_place: bool) -> float:
    """Return the expected duration of the merge in seconds, from the speed of recorded merges."""
    rates = []
    for record in catalogue.merges.list()[:20]:
        options = record.options or {}
        seconds, size = options.get("seconds"), options.get("size_bytes")
        if isinstance(seconds, float) and isinstance(size, int) and seconds > START_SECONDS and size > 1e8:
            rates.append(size / (seconds - START_SECONDS))
    rate = statistics.median(rates) if rates else USUAL_BYTES_PER_SECOND
    return START_SECONDS + (plan.touched_bytes if in_place else plan.base.nbytes) / rate
