"""Pictures of results, drawn with matplotlib (extra ``plot``)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratool.checkpoint.output_kind import OutputKind
from loratool.checkpoint.staging import refuse_existing, staged_file
from loratool.errors import LoratoolError, OutputError, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPTION: Final = "--plot"
FORMATS: Final[dict[str, dict[str, Any]]] = {
    ".pdf": {"CreationDate": None, "Creator": "loratool"},
    ".png": {"Software": "loratool"},
    ".svg": {"Date": None, "Creator": "loratool"},
}
"""Metadata of pictures, by suffix: the program, and no date, so that equal pictures have equal bytes."""

INCHES: Final = (7.0, 4.5)
DOTS_PER_INCH: Final = 150


def refuse_picture(file: Path, *, force: bool) -> None:
    """Check before long work that the picture can be drawn after it.

    Raises:
        OutputError: `file` has no known suffix, exists (without `force`), or cannot be written.
        LoratoolError: matplotlib is not installed.
    """
    if file.suffix not in FORMATS:
        raise OutputError(f"{quoted(file)} is not a name for a picture; end it in {', '.join(FORMATS)}")
    refuse_existing(file, OutputKind.PICTURE, force=force, option=OPTION)
    folder = next(parent for parent in Path(os.path.abspath(file)).parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise OutputError(f"{quoted(folder)} is not a folder that you may write in; choose another place with {OPTION}")
    _require_matplotlib()


def _require_matplotlib() -> None:
    """Raise LoratoolError with advice if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise LoratoolError(f"a picture needs matplotlib ({error}); pip install 'loratool[plot]'") from None


@contextmanager
def drawn(file: Path, *, force: bool) -> Iterator[Figure]:
    """Yield an empty figure to draw on, which is saved as `file` when the block ends without an error.

    The user's settings of matplotlib are ignored, and nothing is shown on a screen.

    Raises:
        OutputError: `file` exists (without `force`) or cannot be written.
        LoratoolError: matplotlib is not installed.
    """
    _require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    chatter = logging.getLogger("matplotlib")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")  # about letters that its fonts lack
            matplotlib.rcdefaults()
            matplotlib.rcParams["svg.hashsalt"] = "loratool"
            figure = Figure(INCHES, DOTS_PER_INCH, layout="constrained")
            yield figure
            with staged_file(file, OutputKind.PICTURE, force=force, option=OPTION) as stage:
                figure.savefig(stage, format=file.suffix[1:], metadata=FORMATS[file.suffix])
    finally:
        chatter.setLevel(level)
