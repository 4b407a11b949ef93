"""Loading torch's compiled library while Python imports what else a command needs."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

LIBRARY: Final = "lib/libtorch_cpu.so"


def preload_torch() -> None:
    """Begin to map and to link torch's largest library on a thread of its own, for a command that will import torch.

    That takes a quarter of a second, in which ``import torch`` would let nothing else run.
    """
    threading.Thread(target=_load).start()


def _load() -> None:
    spec = find_spec("torch")
    with suppress(OSError, AttributeError):  # a system without ``dlopen``: ``import torch`` does what it always does
        dlopen = ctypes.CDLL(
            None
        ).dlopen  # called through ctypes it lets Python run meanwhile; ``ctypes.CDLL(x)`` does not
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        for folder in (spec and spec.submodule_search_locations) or ():
            dlopen(os.fsencode(Path(folder) / LIBRARY), os.RTLD_NOW)
