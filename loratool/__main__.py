"""The command ``loratool``, also as ``python -m loratool``: signals are handled before anything slow is imported."""

from __future__ import annotations

import os
import sys

from loratool import interrupts


def main() -> None:
    """Run the command line."""
    interrupts.install()
    try:
        from loratool.cli import run

        run()
    except KeyboardInterrupt as error:
        interrupts.finish()
        number = error.number if isinstance(error, interrupts.Interrupted) else 2
        if sys.stderr is not None:
            sys.stderr.write("Interrupted: nothing was begun.\n")
            sys.stderr.flush()
        os._exit(128 + number)


if __name__ == "__main__":
    main()
