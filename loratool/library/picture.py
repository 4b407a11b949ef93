"""Pictures of results, drawn by matplotlib, which the extra ``plot`` installs."""

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
"""The suffixes of pictures, and their metadata: who drew them, and no date, so that a picture has the same bytes on any day."""

INCHES: Final = (7.0, 4.5)
DOTS_PER_INCH: Final = 150


def refuse_picture(file: Path, *, force: bool) -> None:
    """Raise before long work for what would fail after it.

    Raises:
        OutputError: `file` has the suffix of no picture, is there already (without `force`), or cannot be written.
        LoratoolError: matplotlib is not installed.
    """
    if file.suffix not in FORMATS:
        raise OutputError(f"{quoted(file)} is no name for a picture; end it in {', '.join(FORMATS)}")
    refuse_existing(file, OutputKind.PICTURE, force=force, option=OPTION)
    folder = next(parent for parent in Path(os.path.abspath(file)).parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise OutputError(f"{quoted(folder)} is no folder that you may write in; choose another place with {OPTION}")
    _require_matplotlib()


def _require_matplotlib() -> None:
    """Raise LoratoolError with the way on where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise LoratoolError(f"a picture needs matplotlib ({error}); pip install 'loratool[plot]'") from None


@contextmanager
def drawn(file: Path, *, force: bool) -> Iterator[Figure]:
    """Give an empty figure to draw on; when the block ends without an error it is the picture `file`.

    matplotlib's own settings hold, whatever those of the user; nothing is shown on a screen.

    Raises:
        OutputError: `file` is there already (without `force`) or cannot be written.
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
            warnings.simplefilter("ignore")  # of letters that its fonts lack
            matplotlib.rcdefaults()
            matplotlib.rcParams["svg.hashsalt"] = "loratool"
            figure = Figure(INCHES, DOTS_PER_INCH, layout="constrained")
            yield figure
            with staged_file(file, OutputKind.PICTURE, force=force, option=OPTION) as stage:
                figure.savefig(stage, format=file.suffix[1:], metadata=FORMATS[file.suffix])
    finally:
        chatter.setLevel(level)
