"""The alpha of an adapter: where its file states it, what the user gives, and whether they contradict each other.

Alpha decides how strongly an adapter acts (its scaling is alpha / rank). Programs store it in different places: a tensor for
each module, a configuration, or the file's metadata. All of them are read. Contradictions are refused, because a wrong guess
would merge at the wrong strength; ``--alpha`` then decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

from loratool.errors import AdapterError, quoted
from loratool.updates.low_rank import LARGEST_SCALING

Alpha = float | Literal["rank"]
"""Alpha as a user gives it: a number, or ``rank`` for each module's own rank, a scaling of 1."""

RANK: Final = "rank"
CONFIGURATION: Final = "its configuration"
"""The place of a statement in a PEFT configuration, for messages."""

RANK_WORDS: Final = "each module's rank"
_WORD: Final = re.compile(r"(?:[\w.-]+\.)?(?:lora_|network_)?alpha|ss_network_alpha|adapter\.lora\.alpha")
"""Metadata keys under which trainers state one alpha for all modules, some prefixed by a component's name."""

_HALF: Final = 2.0**-8
"""Bound of the relative rounding error of bf16."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What one place states: the alpha of each module that it mentions.

    Attributes:
        place: the place, for messages: ``the tensor 'x.alpha'``, ``its metadata 'lora_alpha'``.
        alphas: the alphas by module.
        is_rough: whether the numbers were stored in 16 bits and are only approximate.
    """

    place: str
    alphas: Mapping[str, float]
    is_rough: bool = False


def metadata_statements(metadata: Mapping[str, Any], modules: Iterable[str]) -> list[Statement]:
    """Return what single keys of the metadata state (``lora_alpha``, ``ss_network_alpha``, ``transformer.lora_alpha``, ...)."""
    names = list(modules)
    found = []
    for key, text in sorted(metadata.items()):
        value = _number(text) if _WORD.fullmatch(key) else None
        component = key.rpartition(".")[0]
        of = (
            [name for name in names if name.startswith(f"{component}.")]
            if component not in ("", "adapter.lora")
            else []
        )
        if value is not None:
            found.append(Statement(f"its metadata {quoted(key, 60)}", dict.fromkeys(of or names, value)))
    return found


def settled(ranks: Mapping[str, int], statements: Sequence[Statement], given: Alpha | None, source: str, *,
            absent_is_rank: bool = False, unstated: str = "") -> tuple[dict[str, float], tuple[str, ...]]:  # fmt: skip
    """Return the alpha of each module, and notes on its source.

    Args:
        ranks: the rank of each module.
        statements: what the file states, the most exact place first.
        given: the user's alpha.
        source: the file, for messages.
        absent_is_rank: whether in this format a module without a stated alpha has its rank as alpha.
        unstated: why nothing is stated, if known.

    Raises:
        AdapterError: two places contradict each other, `given` contradicts all of them, alpha is neither stated nor given,
          or a number is not finite.
    """
    said = {module: [(each, each.alphas[module]) for each in statements if module in each.alphas] for module in ranks}
    if given is None:
        _refuse_contradictions(said, source)
    alphas = {}
    for module, rank in ranks.items():
        wanted = None if given is None else float(rank) if given == RANK else float(given)
        stated = said[module]
        if wanted is not None and stated and not any(agree(wanted, value, each) for each, value in stated):
            raise _contradicted(module, stated[0], given, source)
        if wanted is None and not stated and not absent_is_rank:
            raise AdapterError(
                f"{quoted(source)} does not state its alpha (lora_alpha), which decides how strongly it acts{unstated}; give it "
                "with --alpha (a number, or 'rank' for a scaling of 1)"
            )
        alphas[module] = _checked(
            stated[0][1] if wanted is None and stated else rank if wanted is None else wanted, source
        )
    return alphas, _notes(said, given)


def _refuse_contradictions(said: Mapping[str, Sequence[tuple[Statement, float]]], source: str) -> None:
    for module, stated in said.items():
        for (first, one), (second, other) in pairwise(stated):
            if not agree(one, other, first, second):
                raise AdapterError(
                    f"{quoted(source)} contradicts itself: {first.place} says that alpha is {one:g} and {second.place} that "
                    f"it is {other:g} (for {quoted(module, 80)}); say which is right with --alpha"
                )


def _contradicted(module: str, stated: tuple[Statement, float], given: Alpha | None, source: str) -> AdapterError:
    place, value = stated
    return AdapterError(
        f"{quoted(source)} states its own alpha: {place.place} says {value:g} (for {quoted(module, 80)}) and --alpha says "
        f"{RANK_WORDS if given == RANK else f'{given:g}'}; leave --alpha out"
    )


def _notes(said: Mapping[str, Sequence[tuple[Statement, float]]], given: Alpha | None) -> tuple[str, ...]:
    silent = [module for module, stated in said.items() if not stated]
    if given is not None and silent:
        what = f"alpha is {given:g}" if given != RANK else "alpha is each module's rank"
        return (f"the file does not state its alpha: {what}, as you gave it",)
    if given is None and len(silent) == len(said):
        return ("the file states no alpha; in its format that means each module's own rank, a scaling of 1",)
    return ()


def agree(one: float, other: float, *places: Statement) -> bool:
    """Return whether two numbers are the same alpha, within the precision of their places."""
    return math.isclose(one, other, rel_tol=_HALF if any(place.is_rough for place in places) else 1e-6)


def _checked(alpha: float, source: str) -> float:
    if not math.isfinite(alpha) or abs(alpha) > LARGEST_SCALING:
        raise AdapterError(
            f"lora_alpha of {quoted(source)} is {alpha:g}, which fp32 cannot represent; give another --alpha"
        )
    return alpha


def _number(text: object) -> float | None:
    """Return a finite number in metadata; None for words (kohya writes ``Dynamic`` and ``None``)."""
    try:
        value = float(text) if isinstance(text, str | int | float) and not isinstance(text, bool) else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
