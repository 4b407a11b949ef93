"""Written rules that find the tensor of a checkpoint that each parameter of an adapter lands on, by its name.

The rules, in order:

1. A parameter lands on the tensor of the same name. A kohya name, which is the whole path with ``_`` for its dots after
   ``lora_te_`` or a similar prefix, lands on the one tensor with that path.
2. Other modules were named by a program that saw the model under another prefix (``transformer.h.0`` for the
   Hub's GPT-2, whose tensors begin with ``h.0``; ``encoder.layer.0`` for a BERT with its head, ``bert.encoder.layer.0``;
   ``model.layers.0`` for ``model.language_model.layers.0``). One exchange of one leading prefix for another must land all
   of them. What is exchanged never reaches the component before the first number (``layers`` in ``model.layers.0``),
   so a module never moves to another layer or another kind of layer; and it drops names, adds some or moves them, but puts
   none in another's place (``bert`` for ``roberta``), unless both are names of the same part (`same_part`). The exchange that
   keeps most of the module's own name is taken.
3. If several exchanges keep equally much, the only one under which every shape fits is taken.
4. If no single exchange lands them all, each stack of layers, the modules with the same name up to the first number
   (``model.language_model.layers`` and ``model.visual.blocks``, stored as ``model.layers`` and ``visual.blocks``), must land by
   one of its own. What has no number goes by one of these, or else alone: on the only tensor that keeps all of its name, or
   most of it and its last two parts at least (``multi_modal_projector.linear_1`` of ``model.multi_modal_projector.linear_1``).
   So does a tensor that is replaced whole (``modules_to_save``); one of a stack keeps the two names before the number.
5. A stack lands in one, and no two in the same: layers of an image are not those of a text, though the base has room for both.

What lands by none of them goes by the tables of the model's architecture (`formats.landing`). Anything else is an error that
lists the names that did not land and the nearest ones; nothing is guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loratool.architecture import Role, Shaped, any_model, module_of, same_part
from loratool.errors import PlacementError, nearest, quoted
from loratool.updates.shapes import fits_turned

SUFFIX: Final = ".weight"
KOHYA_PREFIX: Final = re.compile(r"(?:lora_[a-z]+\d*|lycoris)_(?=[^.]+$)")
SHOWN: Final = 5

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Replace the leading `old` of a module's name by `new`; both end in a dot or are empty."""

    old: str
    new: str

    def rename(self, name: str) -> str | None:
        """Return the checkpoint's name of the tensor `name`, or None if that does not begin with `old`."""
        return self.new + name[len(self.old) :] if name.startswith(self.old) else None

    def reverse(self, tensor: str) -> str | None:
        """Return the parameter that would land on `tensor`, or None if there is none."""
        return self.old + tensor[len(self.new) :] if tensor.startswith(self.new) else None


def land_by_names(parameters: Mapping[str, Shape], tensors: Mapping[str, Shaped]) -> dict[str, str]:
    """Return the tensor of each of `parameters` that lands by rule 1."""
    return {name: name for name in parameters if name in tensors} | _land_flat(parameters, tensors)


def _land_flat(parameters: Iterable[str], tensors: Mapping[str, Shaped]) -> dict[str, str]:
    """Return where `parameters` with kohya names land; names that match no tensor, or several, are omitted."""
    paths = {name: KOHYA_PREFIX.sub("", module_of(name)) for name in parameters if KOHYA_PREFIX.match(module_of(name))}
    found: dict[str, list[str]] = {}
    for name in tensors if paths else ():
        if name.endswith(SUFFIX):
            found.setdefault(name.removesuffix(SUFFIX).replace(".", "_"), []).append(name)
    return {name: found[path][0] for name, path in paths.items() if len(found.get(path, ())) == 1}


def find_exchanges(rest: Mapping[str, Shape], tensors: Mapping[str, Shaped], source: str) -> dict[str, Exchange]:
    """Return the exchange for each of the parameters `rest` by rules 2 to 4: one for all, else one for each stack.

    Raises:
        NotAllLandError: a parameter lands on no tensor.
        PlacementError: it could land on several.
    """
    try:
        return dict.fromkeys(rest, _find_exchange(rest, tensors, source))
    except NotAllLandError as error:
        whole = error
    stacks: dict[str, dict[str, Shape]] = {}
    for name, shape in rest.items():
        stacks.setdefault(stack_of(name), {})[name] = shape
    loose = stacks.pop("", {})
    try:
        found = {stack: _find_exchange(parameters, tensors, source) for stack, parameters in stacks.items()}
    except NotAllLandError:
        raise whole from None
    exchanges = {name: found[stack] for stack, parameters in stacks.items() for name in parameters}
    for name in loose:
        place = loose_place(name, tuple(found.values()), tensors)
        if place is None:
            raise whole
        exchanges[name] = _between(name, place)
    return exchanges


def loose_place(name: str, exchanges: Sequence[Exchange], tensors: Collection[str]) -> str | None:
    """Return where a tensor lands by the exchange of a stack, else alone by rule 4; None if ambiguous."""
    renamed = (exchange.rename(name) for exchange in exchanges)
    by_stacks = {place for place in renamed if place is not None and place in tensors}
    if by_stacks:
        return by_stacks.pop() if len(by_stacks) == 1 else None
    parts = name.split(".")
    for cut in range(_last_cut(parts) + 1):
        tail = ".".join(parts[cut:])
        ending = [each for each in tensors if each == tail or each.endswith(f".{tail}")]
        if ending:
            new = ending[0].removesuffix(tail)
            is_clear = len(ending) == 1 and not _has_number(new) and not _replaces(name.removesuffix(tail), new)
            return ending[0] if is_clear else None
    return None


def _last_cut(parts: Sequence[str]) -> int:
    """Return the start of the part of a tensor's name that it must keep when it lands alone.

    This part begins with the two names before the first number, or with a module and its parent; shorter names are kept whole.
    """
    number = _first_number(parts)
    of_module = len(parts) - (parts[-1] in ("weight", "bias"))
    return max(0, (of_module if number is None else number) - 2)


def _between(name: str, place: str) -> Exchange:
    """Return the smallest exchange that turns one name into another."""
    parts, others = name.split("."), place.split(".")
    same = next((n for n, (a, b) in enumerate(zip(reversed(parts), reversed(others), strict=False)) if a != b), None)
    same = min(len(parts), len(others)) if same is None else same
    old, new = parts[: len(parts) - same], others[: len(others) - same]
    return Exchange("".join(f"{part}." for part in old), "".join(f"{part}." for part in new))


def stack_of(name: str) -> str:
    """Return a name up to the first number; empty if it has none."""
    parts = name.split(".")
    first = _first_number(parts)
    return "" if first is None else ".".join(parts[:first]) + "."


class NotAllLandError(PlacementError):
    """No one exchange lands all parameters."""


def _find_exchange(rest: Mapping[str, Shape], tensors: Mapping[str, Shaped], source: str) -> Exchange:
    best: tuple[int, Exchange | None] = (0, None)
    example = next((name for name in rest if _has_number(name)), next(iter(rest)))
    for old in _prefixes(list(rest)):
        candidates = sorted(_exchanges(old, example, tensors), key=lambda exchange: exchange.new)
        counted = [(sum(exchange.rename(name) in tensors for name in rest), exchange) for exchange in candidates]
        complete = [exchange for count, exchange in counted if count == len(rest)]
        if complete:
            return _only_one(complete, rest, tensors, source)
        best = max([best, *counted], key=lambda pair: pair[0])
    raise not_landed(rest, best[1] or Exchange("", ""), tensors, source)


def _prefixes(parameters: list[str]) -> Iterator[str]:
    """Yield the exchangeable leading prefixes that all `parameters` share, shortest first; a module keeps its own name."""
    yield ""
    components = module_of(parameters[0]).split(".")
    for count in range(1, len(components)):
        prefix = ".".join(components[:count]) + "."
        if not all(name.startswith(prefix) and not _has_number(_up_to(name, count + 1)) for name in parameters):
            return
        yield prefix


def _up_to(name: str, count: int) -> str:
    return ".".join(name.split(".")[:count])


def _exchanges(old: str, parameter: str, tensors: Mapping[str, Shaped]) -> Iterator[Exchange]:
    """Yield every exchange of `old` under which `parameter` lands on a tensor."""
    tail = parameter[len(old) :]
    for name in tensors:
        new = name[: -len(tail)] if name.endswith(tail) else None
        if new is not None and (not new or new.endswith(".")) and not _has_number(new) and not _replaces(old, new):
            yield Exchange(old, new)


def _replaces(old: str, new: str) -> bool:
    """Return whether an exchange replaces a name by that of a different part."""
    lost, gained = (Counter(map(same_part, prefix.split("."))) for prefix in (old, new))
    return bool(lost - gained and gained - lost)


def _has_number(name: str) -> bool:
    return _first_number(name.split(".")) is not None


def _first_number(parts: Sequence[str]) -> int | None:
    """Return the index of the first part of a name that is a number."""
    return next((place for place, part in enumerate(parts) if part.isdigit()), None)


def _only_one(complete: list[Exchange], rest: Mapping[str, Shape],
              tensors: Mapping[str, Shaped], source: str) -> Exchange:  # fmt: skip
    fitting = [
        exchange
        for exchange in complete
        if all(fits_turned(shape, tensors[str(exchange.rename(name))].shape) for name, shape in rest.items())
    ]
    if len(complete) == 1:
        return complete[0]
    if len(fitting) == 1:
        return fitting[0]
    name = next(iter(rest))
    places = " or ".join(quoted(exchange.rename(name)) for exchange in complete[:SHOWN])
    raise PlacementError(
        f"{quoted(module_of(name))} of {quoted(source)} could land on {places}; rename its modules to the base's own names"
    )


TIED_ADVICE: Final = (
    "the base seems to tie it to its input embedding: merge with --untie, or, into a model with an encoder or several "
    "embeddings, untie it in transformers before"
)


def not_landed(rest: Mapping[str, Shape], exchange: Exchange | None,
               tensors: Mapping[str, Shaped], source: str) -> NotAllLandError:  # fmt: skip
    """Return the error for parameters that land nowhere, also by the best exchange; None if none of `rest` lands."""
    missing = [name for name in rest if exchange is None or exchange.rename(name) not in tensors]
    exchange = exchange or Exchange("", "")
    lines = []
    for name in missing[:SHOWN]:
        near = nearest(exchange.rename(name) or module_of(name), tensors)
        lines.append(
            f"  {quoted(module_of(name))}" + (f"  nearest: {', '.join(quoted(each) for each in near)}" if near else "")
        )
    if len(missing) > SHOWN:
        lines.append(f"  and {len(missing) - SHOWN} more")
    tied = all(is_tied_head(name, tensors) for name in missing)
    advice = TIED_ADVICE if tied else "is it the right base?"
    return NotAllLandError(
        f"{len(missing)} of the modules of {quoted(source)} land on no tensor of the base, so nothing was merged; "
        f"{advice}\n" + "\n".join(lines)
    )


def is_tied_head(parameter: str, tensors: Iterable[str]) -> bool:
    """Return whether a missing parameter is an output head's and the checkpoint has no head, which means that it is tied."""
    return _is_head(module_of(parameter) + SUFFIX) and not any(map(_is_head, tensors))


def _is_head(name: str) -> bool:
    return name.endswith(SUFFIX) and any_model().role(name) is Role.HEAD


def refuse_mixed_stacks(landed: Mapping[str, str], source: str) -> None:
    """Raise PlacementError if a stack of layers lands in two, or two land in one (rule 5)."""
    inhabitants: dict[str, str] = {}
    homes: dict[str, str] = {}
    for name, tensor in landed.items():
        first = inhabitants.setdefault(stack_of(tensor), name)
        if stack_of(tensor) and stack_of(first) != stack_of(name):
            one, other = quoted(module_of(first)), quoted(module_of(name))
            raise PlacementError(
                f"{one} and {other} of {quoted(source)} are of different stacks of layers, and the base has one for both, "
                f"{quoted(stack_of(tensor) + '…')}; is it the right base?"
            )
        first = homes.setdefault(stack_of(name), tensor)
        if stack_of(name) and stack_of(first) != stack_of(tensor):
            raise PlacementError(
                f"{quoted(stack_of(name) + '…')} of {quoted(source)} is one stack of layers, and would land on {quoted(first)} "
                f"and on {quoted(tensor)} of two; is it the right base?"
            )
