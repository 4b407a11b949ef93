"""loratool keeps LoRA adapters the way git keeps source: named, hashed, tied to their base, merged and taken out exactly.

Every command of the command line is one function here, with the same name and the same words:

    import loratool

    loratool.base_add("smollm2", "models/smollm2")
    loratool.add("pirate/", base="smollm2")
    result = loratool.merge(["pirate"], into="smollm2")
    loratool.verify(result.out)
    loratool.unmerge(result.out)

``loratool.eval`` is also called ``loratool.evaluate``, and ``loratool.list`` ``loratool.list_adapters``: under these names
``from loratool import *`` brings them, which so hides nothing of Python's own.
Functions are imported when they are first used, so ``import loratool`` is quick and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from loratool.errors import LoratoolError

if TYPE_CHECKING:
    from loratool.library.add import add
    from loratool.library.bases import base_add, base_list, base_remove, base_show, base_verify
    from loratool.library.combine import combine
    from loratool.library.doctor import doctor
    from loratool.library.estimate import estimate
    from loratool.library.evaluate import evaluate as evaluate
    from loratool.library.export import export
    from loratool.library.extract import extract
    from loratool.library.hub_search import hub_search
    from loratool.library.list import list_adapters as list_adapters
    from loratool.library.merge import merge
    from loratool.library.prune import prune
    from loratool.library.pull import pull
    from loratool.library.push import push
    from loratool.library.quantize import quantize
    from loratool.library.remove import remove
    from loratool.library.restore import restore
    from loratool.library.show import show
    from loratool.library.spectrum import spectrum
    from loratool.library.tag import tag
    from loratool.library.train import train
    from loratool.library.truncate import truncate
    from loratool.library.unmerge import unmerge
    from loratool.library.verify import verify
    from loratool.library.verify_delivery import verify_delivery

    eval = evaluate  # noqa: A001
    list = list_adapters  # noqa: A001

__all__ = [
    "LoratoolError",
    "add",
    "base_add",
    "base_list",
    "base_remove",
    "base_show",
    "base_verify",
    "combine",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "extract",
    "hub_search",
    "list_adapters",
    "merge",
    "prune",
    "pull",
    "push",
    "quantize",
    "remove",
    "restore",
    "show",
    "spectrum",
    "tag",
    "train",
    "truncate",
    "unmerge",
    "verify",
    "verify_delivery",
]

_FUNCTIONS: Final = {
    "add": ("add", "add"),
    "base_add": ("bases", "base_add"),
    "base_list": ("bases", "base_list"),
    "base_remove": ("bases", "base_remove"),
    "base_show": ("bases", "base_show"),
    "base_verify": ("bases", "base_verify"),
    "combine": ("combine", "combine"),
    "doctor": ("doctor", "doctor"),
    "estimate": ("estimate", "estimate"),
    "eval": ("evaluate", "evaluate"),
    "evaluate": ("evaluate", "evaluate"),
    "export": ("export", "export"),
    "extract": ("extract", "extract"),
    "hub_search": ("hub_search", "hub_search"),
    "list": ("list", "list_adapters"),
    "list_adapters": ("list", "list_adapters"),
    "merge": ("merge", "merge"),
    "prune": ("prune", "prune"),
    "pull": ("pull", "pull"),
    "push": ("push", "push"),
    "quantize": ("quantize", "quantize"),
    "remove": ("remove", "remove"),
    "restore": ("restore", "restore"),
    "show": ("show", "show"),
    "spectrum": ("spectrum", "spectrum"),
    "tag": ("tag", "tag"),
    "train": ("train", "train"),
    "truncate": ("truncate", "truncate"),
    "unmerge": ("unmerge", "unmerge"),
    "verify": ("verify", "verify"),
    "verify_delivery": ("verify_delivery", "verify_delivery"),
}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    module, function = _FUNCTIONS[name]
    return getattr(import_module(f"loratool.library.{module}"), function)


def __dir__() -> Sequence[str]:
    own = [name for name, value in globals().items() if name.startswith("__") or isinstance(value, ModuleType)]
    return sorted({*own, *__all__, *_FUNCTIONS})
