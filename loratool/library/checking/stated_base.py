"""Comparison of the base that an adapter names with the base that it is merged into, if no fingerprint decides.

`X-Instruct` and `X` have the same shapes, so an adapter for one lands on the other without an error. Names are compared by
these rules:

1. A name is the last component of a path or Hub id, without a revision, in lower case, with ``-`` for ``_`` and blanks. Words
   for the storage or the publisher (``bnb-4bit``, ``GPTQ``, ``bf16``, ``hf``, ``unsloth``) are left out, and so is ``meta`` at
   the beginning. So `unsloth/Meta-Llama-3.1-8B-bnb-4bit` is `Llama-3.1-8B`.
2. Generic names (``model``, ``base``, ``checkpoint-500``, a commit's hash) are ignored. A folder of the Hub's cache has the name
   of its repository.
3. If the Hub id of a base is known, only that is its name. Any other base has several: its catalogued name, its folder's name,
   and those of the models it was quantized or merged from. One of them must be the name that the adapter states.
4. A folder's name without a size (``8b``, ``135m``) may mean anything. It counts as different only if it shares a word with
   the other name and they differ by a word that distinguishes models (``instruct``, ``chat``, ``large``). It does not if it is
   merely a shorter form of a stated name with a size (``llama`` for ``Llama-3.1-8B-Instruct``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loratool.errors import LoratoolError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.identity import AnyAdapter
from loratool.hub.address import is_repository
from loratool.library.resolving.adapter_name import GENERIC, is_generic
from loratool.merging.manifest import KINDS, read_manifest
from registry import BaseRecord

TRAINED_ON_KEY: Final = "ss_sd_model_name"
"""Metadata key for the file name of the base in kohya's files."""

_STORED: Final = """
    bnb bit 2bit 3bit 4bit 6bit 8bit gptq awq gguf mlx nf4 fp4 fp8 int4 int8 nvfp4 mxfp4 w4a16 w8a8 w8a16 exl2 hqq aqlm bf16 fp16
    fp32 f16 f32 float16 bfloat16 dynamic quantized quant hf unsloth safetensors ckpt st dequantized dense
"""
STORED: Final = frozenset(_STORED.split())
"""Words for a model's storage or publisher, which do not identify the model."""

_SAYS_NOTHING: Final = "base bases llm lm pretrained foundation original parent the my"
SAYS_NOTHING: Final = GENERIC | set(_SAYS_NOTHING.split())

_TELLS_APART: Final = """
    instruct instruction chat it base sft dpo orpo rl rlhf tuned coder code math vl vision omni audio reasoning think thinking
    distill distilled reward guard embedding nano micro mini tiny small medium large xl xxl
"""
TELLS_APART: Final = frozenset(_TELLS_APART.split())
"""Words that distinguish models of one family."""

_SIZE: Final = re.compile(r"(\d+x)?\d+(\.\d+)?[bm]")
_IN_CACHE: Final = re.compile(r"models--(?:.+?)--(?P<name>[^/\\]+)([/\\]snapshots([/\\][^/\\]+)?)?[/\\]?$")
_SUFFIX: Final = re.compile(r"\.(safetensors|ckpt|gguf|st|bin|pt)$")

Words = tuple[str, ...]


def other_base_notes(adapter: AnyAdapter, name: str, path: Path | None, record: BaseRecord | None) -> list[str]:
    """Return a note if an adapter names another base than the base `name` that it is merged into.

    `path` is the base's folder or file, and `record` its entry in the catalogue, if it has them.
    """
    stated = next((each for each in _stated_by(adapter) if words_of(each)), None)
    if stated is None:
        return []
    hub_id = record.source if record is not None and is_repository(record.source) else _in_cache(path)
    locals_ = [] if hub_id else list(_local_names(name, path, record))
    if not is_other(stated, hub_id, locals_):
        return []
    return [
        f"{quoted(adapter.name)} names {quoted(stated)} as its base, and {quoted(hub_id or name)} seems to be another model, "
        "though it fits: check that it is the right one"
    ]


def is_other(stated: str, hub_id: str | None, names: Sequence[str]) -> bool:
    """Return whether a base, by its Hub id or else its local `names`, is a different one than the `stated`."""
    wanted = words_of(stated)
    if not wanted:
        return False
    if hub_id is not None and words_of(hub_id):
        return words_of(hub_id) != wanted
    known = [words for words in map(words_of, names) if words]
    is_path = not is_repository(stated)
    telling = [words for words in known if not _is_made_up(words, wanted, stated_is_path=is_path)]
    return wanted not in known and bool(telling)


def words_of(name: str) -> Words:
    """Return the words of a model's name that identify it; empty for a generic name."""
    cached = _IN_CACHE.search(name)
    last = cached["name"] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1].partition("@")[0]
    plain = _SUFFIX.sub("", last.casefold())
    words = [word for word in re.split(r"[^a-z0-9.]+", plain) if word and word not in STORED]
    if words[:1] == ["meta"]:
        words = words[1:]
    if is_generic(last) or all(word in SAYS_NOTHING or word.isdecimal() for word in words):
        return ()
    return tuple(words)


def _is_made_up(words: Words, stated: Words, *, stated_is_path: bool) -> bool:
    """Return whether names that a user may have made up do not distinguish a base from the stated one, by rule 4."""
    has_size, has_stated_size = (any(map(_SIZE.fullmatch, each)) for each in (words, stated))
    if has_size and (has_stated_size or not stated_is_path):
        return False
    own, others = set(words), set(stated)
    is_short = has_stated_size and own < others
    return is_short or own.isdisjoint(others) or TELLS_APART.isdisjoint(own ^ others)


def _stated_by(adapter: AnyAdapter) -> Iterator[str]:
    if adapter.base_model:
        yield adapter.base_model
    trained_on = _metadata_of(adapter).get(TRAINED_ON_KEY)
    if isinstance(trained_on, str) and trained_on:
        yield trained_on


def _metadata_of(adapter: AnyAdapter) -> Mapping[str, Any]:
    if isinstance(adapter, Adapter):
        return adapter.layout.metadata if adapter.layout else {}
    return adapter.files.metadata


def _in_cache(path: Path | None) -> str | None:
    """Return the repository of a folder in the Hub's cache; None for other paths."""
    found = None if path is None else _IN_CACHE.search(str(path.resolve()))
    return None if found is None else found["name"]


def _local_names(name: str, path: Path | None, record: BaseRecord | None) -> Iterator[str]:
    """Yield the local names of a base, and of the models it was made from, whose adapters also fit it."""
    yield name
    if record is not None and record.variant_of:
        yield record.variant_of
    if path is not None:
        yield path.resolve().name
        try:
            manifest = read_manifest(path, KINDS)
        except (LoratoolError, OSError):
            return
        yield manifest.base_name
        yield manifest.base_path
