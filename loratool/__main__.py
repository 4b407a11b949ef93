"""``python -m loratool``."""

from loratool.cli import main

main()
