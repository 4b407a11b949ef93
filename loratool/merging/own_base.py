"""Updates of parameters of which an adapter's file also holds the base's value (PEFT's ``base_layer``)."""

from __future__ import annotations

from loratool.architecture import WHOLE, Place
from loratool.checkpoint.dtypes import DENSE
from loratool.checkpoint.fingerprint import hash_tensor
from loratool.errors import PlacementError, UnsupportedError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.names import SUFFIX
from loratool.updates import Update
from loratool.updates.based import Based
from loratool.updates.part import is_divisible, part_of
from loratool.weights.storage import Model
from loratool.weights.stored import StoredWeight


def part_on_own_base(parameter: str, update: Update, adapter: Adapter, place: Place, base: Model) -> Update:
    """Return the part of an update that lands on a place, on the adapter's own copy of the base's parameter if it holds another.

    Raises:
        PlacementError: the copy is of a weight, which training does not change, and has other numbers.
        UnsupportedError: an adapter with such a copy lands on a part of a stored parameter, or an update that has no parts
            does.
    """
    own, stored = adapter.own_base.get(parameter), base.tensors.get(place.name)
    if own is None or stored is None:
        if place.own == WHOLE:
            return update
        if not is_divisible(update):
            raise UnsupportedError(
                f"{quoted(parameter)} of {quoted(adapter.name)} is {update.kind}, which has no parts, and the base "
                f"stores them apart, as in {quoted(place.name)}; merge it with PEFT into a base that stores them as one"
            )
        return part_of(update, place.own)
    if place.own != WHOLE or not place.view.is_whole:
        raise UnsupportedError(
            f"{quoted(adapter.name)} holds {quoted(own.name)}, a copy of its base's, which packs it into "
            f"{quoted(stored.name)}; save it again with PEFT's save_pretrained(..., save_embedding_layers=False)"
        )
    are_alike = (own.dtype, own.shape) == (stored.dtype, stored.shape)
    if are_alike and hash_tensor(own) == hash_tensor(stored):
        return update
    if are_alike and parameter.endswith(SUFFIX):
        raise PlacementError(
            f"{quoted(adapter.name)} holds {quoted(own.name)}, a copy of its base's, and {quoted(stored.name)} has other "
            "numbers; merge into the base that it was trained on, or save it again with PEFT's save_pretrained(..., "
            "save_embedding_layers=False)"
        )
    return Based(own, update)


def refuse_copy(update: Based, weight: StoredWeight, source: Adapter) -> None:
    """Raise UnsupportedError if an adapter's copy of the base's parameter cannot replace it."""
    if update.tensor.dtype not in DENSE or not weight.is_replaceable:
        raise UnsupportedError(
            f"{quoted(source.name)} holds {quoted(update.tensor.name)} in {update.tensor.dtype}, which PEFT would put in the "
            f"place of the base's, stored {weight.words}; save the adapter again with PEFT's save_pretrained(..., "
            "save_embedding_layers=False)"
        )
