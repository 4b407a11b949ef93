"""Check for weights in files of their own beside an adapter, which a merge would leave out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from loratool.errors import AdapterError, quoted
from loratool.formats.adapter import Adapter
from loratool.formats.trained_beside import trained_beside

WITHOUT_EXTRAS: Final = "--without-extras"


def refuse_trained_beside(adapters: Sequence[Adapter], *, without: bool) -> None:
    """Check that no adapter was trained with weights that a merge would leave out, unless `without` allows it.

    Raises:
        AdapterError: one was, and `without` is off.
    """
    for adapter in () if without else adapters:
        names = trained_beside(adapter)
        if names:
            listed = ", ".join(quoted(name, 60) for name in names[:4]) + (", ..." if names[4:] else "")
            raise AdapterError(
                f"{quoted(adapter.name)} was trained with weights that lie beside it ({listed}), and a merge would leave them "
                f"out, so the model would differ from the trained one; give {WITHOUT_EXTRAS} to merge the adapter alone"
            )
