"""The names that PEFT gives to an adapter's tensors: ``base_model.model.<module>.lora_A.weight``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from loratool.checkpoint.header import TensorInfo
from loratool.errors import AdapterError, UnsupportedError, quoted
from loratool.formats.kinds import FEATURES, KINDS

PREFIX: Final = "base_model.model."
_FACTOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_"
    r"(?:(?P<factor>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight|(?P<of_embedding>embedding_[AB])(?:\.(?P<its_adapter>[^.]+))?)"
)
EMBEDDING: Final = "embedding_"
"""Beginning of the letters of an embedding's factors."""

ALPHA: Final = ".alpha"
KERNELS: Final = (3, 4, 5)
"""Dimensions of the factors of convolutions over one, two and three axes."""

_LETTERS: Final = {"A": "A", "B": "B", "down": "A", "up": "B"}
_MARKS: Final = tuple(part for kind in KINDS.values() for part in kind.parts)
"""Beginnings of the name component that shows the kind of adapter."""

BASE_LAYER: Final = "base_layer"
"""Name component under which PEFT keeps the base's own layer inside an adapted one."""

_COPIES: Final = (BASE_LAYER, "modules_to_save", "original_module")
"""Name components under which PEFT keeps a whole tensor of the base."""

TOKEN_ADAPTER: Final = "token_adapter"
"""Name component under which PEFT keeps trained rows of an embedding, and the embedding itself."""

_WRAPPERS: Final = (BASE_LAYER, TOKEN_ADAPTER)
"""Name components that PEFT inserts between a module's name and its tensors."""


def split_peft(name: str) -> tuple[str, str] | None:
    """Split a tensor's name in PEFT into module and part (``lora_A.weight``); return None if it is not an adapter's tensor.

    Tensors that all modules share (``base_model.vera_A``) have the module ``""``.
    """
    components = name.removeprefix(PREFIX).removeprefix("base_model.").split(".")
    marked = [place for place, component in enumerate(components) if component.startswith(_MARKS)]
    copy = [place for place, component in enumerate(components[:-1]) if component in _COPIES]
    if not marked and not copy:
        return None
    place = marked[-1] if marked else copy[-1]
    while place and components[place - 1] in _WRAPPERS:
        place -= 1
    return ".".join(components[:place]), ".".join(components[place:])


def adapters_in(tensors: Iterable[str]) -> frozenset[str]:
    """Return the adapters' names that a saved model state has in its tensors' names; PEFT's default name always counts."""
    matches = (_FACTOR.fullmatch(name) for name in tensors)
    return frozenset({"default", *(name for match in matches if match and (name := _adapter(match)))})


def peft_key(module: str, factor: str) -> str:
    """Return PEFT's name of factor ``A`` or ``B`` of `module`, or ``embedding_A`` or ``embedding_B``."""
    return f"{PREFIX}{module}.lora_{factor}" + ("" if factor.startswith(EMBEDDING) else ".weight")


def _adapter(match: re.Match[str]) -> str | None:
    """Return the adapter's name in a factor's name, if it has one."""
    return match["adapter"] or match["its_adapter"]


def pair_factors(tensors: Mapping[str, TensorInfo], source: str) -> dict[str, dict[str, TensorInfo]]:
    """Return the factors of each module by their letters, A first, sorted by module name; alphas among the tensors are ignored.

    Raises:
        UnsupportedError: tensors belong to features that loratool does not compute; the message names all of these.
        AdapterError: a factor has the wrong shape or no partner, or there are no factors.
    """
    refuse_other_features(
        tensors, source, "LoRA", lambda name: name.endswith(ALPHA) or _FACTOR.fullmatch(name) is not None
    )
    factors: dict[str, dict[str, TensorInfo]] = {}
    adapters = set()
    for name, info in sorted(tensors.items()):
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        letter = match["of_embedding"] or _LETTERS[match["factor"]]
        if 0 in info.shape or not (len(info.shape) == 2 or (len(info.shape) in KERNELS and match["factor"])):
            raise _no_matrix(info, source)
        pair = factors.setdefault(match["module"], {})
        if letter in pair:
            raise AdapterError(f"{quoted(source)} holds lora_{letter} of {quoted(match['module'])} twice")
        pair[letter] = info
        adapters.add(_adapter(match))
    if len(adapters) > 1:
        raise AdapterError(f"{quoted(source)} holds several adapters ({len(adapters)}); save each to a file of its own")
    if not factors:
        raise AdapterError(f"{quoted(source)} holds no LoRA tensors; is it an adapter?")
    return {module: _complete(module, pair, source) for module, pair in sorted(factors.items())}


def rank_of(pair: Mapping[str, TensorInfo]) -> int:
    """Return the rank of a module with these factors, A first."""
    return next(iter(pair.values())).shape[0]


def alpha_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors with the alpha of a module (``<module>.alpha``), by module."""
    return {
        name.removeprefix(PREFIX).removesuffix(ALPHA): info for name, info in tensors.items() if name.endswith(ALPHA)
    }


def refuse_other_features(tensors: Iterable[str], source: str, title: str, is_own: Callable[[str], bool]) -> None:
    """Raise UnsupportedError if tensors belong to features that loratool does not compute; the message names all of them.

    Args:
        title: the kind of the adapter, for messages.
        is_own: tells the tensors of that kind by their names.
    """
    found: dict[str, tuple[str, str]] = {}
    strange, own = "", False
    for name in sorted(tensors):
        if is_own(name):
            own = True
            continue
        feature = _feature_of(name)
        if feature is None:
            strange = strange or name
        else:
            found.setdefault(feature[0], (name, feature[1]))
    if found:
        titles = sorted(found, key=_ORDER.index)
        said = [f"{title} (tensor {quoted(found[title][0])})" for title in titles]
        raise UnsupportedError(f"{quoted(source)} uses {' and '.join(said[:3])}: {found[titles[0]][1]}")
    if strange and own:
        raise UnsupportedError(
            f"{quoted(source)} holds {quoted(strange)}, which is no {title} tensor that loratool knows; merge it with the "
            "program that trained it"
        )


_ORDER: Final = [feature.title for feature in FEATURES] + [kind.title for kind in KINDS.values()]


def _feature_of(name: str) -> tuple[str, str] | None:
    """Return the feature that a tensor's name shows, and why it is not computed."""
    where = split_peft(name)
    if where is None:
        last = name.rpartition(".")[2]
        return next(
            ((kind.title, kind.why_not) for kind in KINDS.values() if kind.why_not and last in kind.other_parts), None
        )
    for feature in FEATURES:
        if feature.parts and where[1].startswith(feature.parts):
            return feature.title, feature.why_not
    for kind in KINDS.values():
        if kind.why_not and kind.parts and where[1].startswith(kind.parts):
            return kind.title, kind.why_not
    return None


def _no_matrix(info: TensorInfo, source: str) -> AdapterError:
    return AdapterError(
        f"{quoted(info.name)} in {quoted(source)} has shape {list(info.shape)} and must be a matrix or a convolution's kernel; "
        "was it saved from a sharded run without gathering?"
    )


def _complete(module: str, pair: Mapping[str, TensorInfo], source: str) -> dict[str, TensorInfo]:
    start = EMBEDDING if any(letter.startswith(EMBEDDING) for letter in pair) else ""
    letters = (f"{start}A", f"{start}B")
    missing = [letter for letter in letters if letter not in pair]
    if missing:
        raise AdapterError(f"{quoted(module)} in {quoted(source)} has no lora_{missing[0]}; the file is incomplete")
    if len(pair) > 2:
        raise AdapterError(
            f"{quoted(source)} holds factors of {quoted(module)} as of an embedding and of a linear layer"
        )
    a, b = (pair[letter] for letter in letters)
    if a.shape[0] != b.shape[1] or len(a.shape) != len(b.shape) or any(side != 1 for side in b.shape[2:]):
        raise AdapterError(
            f"the factors of {quoted(module)} in {quoted(source)} do not fit together: "
            f"lora_{letters[0]} is {list(a.shape)} and lora_{letters[1]} is {list(b.shape)}"
        )
    return dict(zip(letters, (a, b), strict=True))
