"""``python -m loratool``."""

from loratool.cli import run

run()
