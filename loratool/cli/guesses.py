"""Hints for commands that do not exist: words of other tools, and typing errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

SHOW: Final = "'loratool show ADAPTER' shows an adapter, and 'loratool base show BASE' a base"
LIST: Final = "'loratool list' lists adapters, and 'loratool base list' bases"
RENAME: Final = "'loratool add PATH --name NEW' catalogues an adapter under a second name"
MODEL: Final = (
    "loratool runs no model; 'loratool merge ADAPTER' writes one that transformers, vLLM or llama.cpp's converter load"
)
HELP: Final = "'loratool --help' shows all commands, and 'loratool COMMAND --help' one"
REMOVE: Final = "'loratool remove --help' shows how to remove an adapter from the catalogue"
RESTORE: Final = "'loratool restore ADAPTER' brings back what was removed, and 'loratool restore' lists it"
SEARCH: Final = "'loratool hub search TEXT' searches the Hub, and 'loratool list' the catalogue"
COMPARE: Final = (
    "'loratool eval MODEL --data FILE --adapter ADAPTER' measures an adapter, and 'loratool show ADAPTER' its facts"
)
GET: Final = "'loratool add PATH' catalogues an adapter on this disk, and 'loratool pull REPO' one on the Hub"
EVAL: Final = "'loratool eval MODEL --data FILE' measures a model"
UNMERGE: Final = "'loratool unmerge MERGED' takes a merge out again"
CHECK: Final = "'loratool doctor' checks the catalogue, and 'loratool verify MERGED' a merged model"
COPY: Final = "'loratool export ADAPTER --out PATH' writes an adapter's files"
BASE: Final = "'loratool base list' lists bases, and 'loratool base add NAME SOURCE' adds one"
UPDATE: Final = "'loratool pull REPO --update' looks for a newer version on the Hub"
LOGIN: Final = "'hf auth login' logs you in to the Hub"
UPLOAD: Final = "'loratool push ADAPTER' uploads an adapter to the Hub"

GUESSES: Final = {
    "base-add": BASE, "bases": BASE, "model": BASE, "models": BASE,
    "bench": EVAL, "evaluate": EVAL, "loss": EVAL, "perplexity": EVAL, "score": EVAL, "test": EVAL,
    "cat": SHOW, "describe": SHOW, "details": SHOW, "get": SHOW, "info": SHOW, "inspect": SHOW, "view": SHOW,
    "chat": MODEL, "generate": MODEL, "infer": MODEL, "run": MODEL, "serve": MODEL, "speak": MODEL,
    "check": CHECK, "fsck": CHECK, "gc": CHECK, "status": CHECK, "validate": CHECK,
    "compare": COMPARE, "diff": COMPARE,
    "copy": COPY, "cp": COPY, "save": COPY,
    "clone": GET, "create": GET, "download": GET, "fetch": GET, "import": GET, "install": GET, "new": GET, "register": GET,
    "delete": REMOVE, "del": REMOVE, "drop": REMOVE, "forget": REMOVE, "rm": REMOVE, "uninstall": REMOVE,
    "adapters": LIST, "catalogue": LIST, "catalog": LIST, "ls": LIST,
    "find": SEARCH, "query": SEARCH, "search": SEARCH,
    "help": HELP, "usage": HELP, "version": "'loratool --version' shows the version",
    "login": LOGIN, "whoami": LOGIN,
    "move": RENAME, "mv": RENAME, "rename": RENAME,
    "recover": RESTORE, "trash": RESTORE, "undelete": RESTORE, "unremove": RESTORE,
    "publish": UPLOAD, "share": UPLOAD, "upload": UPLOAD,
    "finetune": "'loratool train' trains an adapter", "fine-tune": "'loratool train' trains an adapter",
    "revert": UNMERGE, "undo": UNMERGE,
    "svd": "'loratool truncate ADAPTER --rank R' lowers the rank of an adapter",
    "update": UPDATE, "upgrade": UPDATE,
}  # fmt: skip
"""The hint for each word that other tools use."""

ASKED_FOR: Final = 0.8
"""The least similarity of a word to a command that removes something for a hint at that command."""

LIKE: Final = 0.6
"""The least similarity to any other command."""


def hint_for(word: str, group: str, commands: Iterable[str]) -> str:
    """Return a hint for an unknown `word` among the `commands` of a group (``loratool`` or ``loratool base``).

    No command in a hint removes anything if it is typed as shown.
    """
    word, others = word.lower(), [name for name in commands if name != "remove"]
    if group == "loratool" and word in GUESSES:
        return GUESSES[word]
    if difflib.SequenceMatcher(a=word, b="remove").ratio() >= ASKED_FOR:
        return f"'{group} remove --help' explains that command"
    near = difflib.get_close_matches(word, others, n=1, cutoff=LIKE)
    return f"did you mean '{group} {near[0]}'?" if near else f"'{group} --help' shows all commands"
