"""Every command of loratool is a function too: catalogue the pirate adapter, merge it, check it, take it out again.

python examples/get_smollm2.py models/smollm2
python examples/use_the_library.py models/smollm2
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import loratool
from loratool.errors import LoratoolError

PIRATE = Path(__file__).parent / "pirate"


def round_trip(base: Path, scratch: Path) -> None:
    """Merges the pirate adapter into `base` and restores the base's bytes from the merged model."""
    loratool.add(PIRATE, name="pirate")
    print("catalogued: pirate")

    merged = loratool.merge(["pirate"], into=base, out=scratch / "smollm2-pirate", undo=True)
    print(f"merged:     {merged.out}")

    loratool.verify(merged.out)
    print("verified:   every byte is what the manifest says")

    restored = loratool.unmerge(merged.out, out=scratch / "smollm2-again")
    same = (restored.out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    print(f"unmerged:   {restored.out}, {'the same bytes as' if same else 'NOT the same bytes as'} the base")


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python examples/use_the_library.py BASE_FOLDER", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="loratool-") as scratch:
            round_trip(Path(sys.argv[1]), Path(scratch))
    except LoratoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
