"""Which catalogued base an adapter belongs to: by the fingerprint that it records, else by the name that it gives."""

from __future__ import annotations

from loratool.checkpoint.model import Checkpoint
from loratool.errors import LoratoolError, PlacementError, WrongBaseError, quoted
from loratool.formats.adapter import Adapter
from loratool.hub.address import is_hub_id
from loratool.library.hub_bases import is_away, known_headers
from loratool.library.resolve import exists
from loratool.merging.plan import WeightedAdapter, plan_merge
from registry import BaseRecord, Registry, check_name


def find_owner(adapter: Adapter, base: str | None, base_model: str | None,
           catalogue: Registry) -> tuple[BaseRecord | None, list[str]]:  # fmt: skip
    """The catalogued base that the adapter belongs to, checked by names and shapes, and notes on how it was found.

    `base_model` is its name as the adapter's configuration or card records it.
    """
    recorded = adapter.base_fingerprint
    if base is not None:
        record = catalogue.bases.find(check_name(base, "base"))
        if recorded and record.fingerprint and not catalogue.bases.same_family(recorded, record.fingerprint):
            raise WrongBaseError(
                f"{quoted(adapter.name)} records another base ({recorded[:12]}…) than {quoted(base)}; leave --base out"
            )
        _refuse_unfit(adapter, record)
        return record, []
    if recorded:
        known = catalogue.bases.find_by_fingerprint(recorded)
        if known:
            _refuse_false_record(adapter, known[0])
            return known[0], []
    named = [record for record in catalogue.bases.list() if base_model and _is_called(record, base_model)]
    for record in named:
        # What one that is not downloaded yet will turn out to be is compared then.
        if recorded and record.fingerprint:
            continue
        try:
            _refuse_unfit(adapter, record)
        except LoratoolError:
            break
        return record, [f"it names {quoted(record.source)} as its base, which is catalogued as {quoted(record.name)}"]
    return None, [_how_to_tie(base_model, known_by_content=bool(recorded), unfit=bool(named))]


def _is_called(record: BaseRecord, base_model: str) -> bool:
    """Whether a base came from the repository or folder of this name; the Hub does not tell letters' case apart."""
    return record.source == base_model or ("/" in base_model and record.source.casefold() == base_model.casefold())


def _how_to_tie(base_model: str | None, *, known_by_content: bool, unfit: bool) -> str:
    if base_model and is_hub_id(base_model) and not unfit:
        name = base_model.rpartition("/")[2]
        how = f"its base is not catalogued yet; add it with 'loratool base add {name} {base_model}'"
        return how if known_by_content else f"{how}, then tie this to it with --base {name}"
    if known_by_content:
        return "its base is not catalogued yet; add it with 'loratool base add'"
    hint = f" (its configuration names {quoted(base_model)})" if base_model else ""
    return f"it is tied to no base yet{hint}; add it again with --base NAME to tie it to one"


def _refuse_false_record(adapter: Adapter, record: BaseRecord) -> None:
    """Raise WrongBaseError if the adapter records the base by its fingerprint and does not land on it: one of both is false."""
    try:
        _refuse_unfit(adapter, record)
    except PlacementError as error:
        line = str(error).split("\n")[0]
        raise WrongBaseError(
            f"{quoted(adapter.name)} records {quoted(record.name)} as its base and does not land on it ({line}); ask whoever "
            "made it, or do not use it"
        ) from None


def _refuse_unfit(adapter: Adapter, record: BaseRecord) -> None:
    """Raise LoratoolError if the adapter does not land on the base; one whose files are away is taken at its word."""
    if is_away(record):
        checkpoint = known_headers(record)
    else:
        checkpoint = Checkpoint.open(record.path) if record.path is not None and exists(record.path) else None
    if checkpoint is not None:
        plan_merge([WeightedAdapter(adapter)], checkpoint)
