"""Loading of torch's compiled library while Python imports other modules."""

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
    """Start to load torch's largest library in a thread, for a command that will import torch.

    Loading takes a quarter of a second, during which ``import torch`` would block everything else.
    """
    threading.Thread(target=_load).start()


def _load() -> None:
    spec = find_spec("torch")
    with suppress(OSError, AttributeError):  # without ``dlopen``, ``import torch`` loads it as usual
        dlopen = ctypes.CDLL(None).dlopen  # releases the GIL when called through ctypes; ``ctypes.CDLL(x)`` does not
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        for folder in (spec and spec.submodule_search_locations) or ():
            dlopen(os.fsencode(Path(folder) / LIBRARY), os.RTLD_NOW)
