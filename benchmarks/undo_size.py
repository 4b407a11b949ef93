"""How large undo files are, and that every way back gives the base's bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp()

from models import DATA, EXAMPLES, llama, lora, smollm2
from results import holds, report, table

import loratool

CASES = [
    ("SmolLM2-135M, examples/pirate (trained)", smollm2, lambda: EXAMPLES / "pirate"),
    ("1.1 B shape, random r=16 on q, v", llama, lambda: lora("qv")),
    ("1.1 B shape, random r=16 on all linear", llama, lambda: lora("all")),
]


def main() -> None:
    rows = []
    for title, base_of, adapter_of in CASES:
        base, adapter = base_of(), adapter_of()
        out, back, place = (DATA / name for name in ("undo-merged", "undo-back", "undo-place"))
        merged = loratool.merge([adapter], into=base, out=out, undo=True)
        assert merged.undo_file is not None
        share = merged.undo_file.stat().st_size / merged.plan.touched_bytes
        kept = sum(file.stat().st_size for file in merged.undo_file.parent.iterdir())
        ways = {}
        undone = loratool.unmerge(out, out=back)
        ways[undone.method] = same(base, back)
        shutil.rmtree(back)
        merged.undo_file.unlink()
        undone = loratool.unmerge(out, out=back)
        ways[undone.method] = same(base, back)
        shutil.copytree(base, place)
        loratool.merge([adapter], into=place, in_place=True)
        loratool.unmerge(place, in_place=True)
        ways["in place"] = same(base, place)
        for folder in (out, back, place):
            shutil.rmtree(folder)
        equal = ", ".join(f"{way}: {'equal' if good else '**differs**'}" for way, good in ways.items())
        target = holds(share, most=0.016) + " (1.6%)" if "trained" in title else ""
        whole = f"{kept / merged.plan.touched_bytes:.2%}"
        rows.append([title, f"{merged.plan.touched_bytes / 1e6:.0f} MB", f"{share:.2%}", target, whole, equal])
    columns = ["merge", "weights touched", "undo file", "", "with the adapter's copy", "every file after unmerging"]
    body = table(columns, rows)
    report("undo_size", "Undo files", body)


def same(a: Path, b: Path) -> bool:
    names = {str(file.relative_to(a)) for file in a.rglob("*") if file.is_file() and ".cache" not in file.parts}
    others = {str(file.relative_to(b)) for file in b.rglob("*") if file.is_file() and ".cache" not in file.parts}
    return names == others and all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


if __name__ == "__main__":
    main()
    shutil.rmtree(os.environ["LORATOOL_HOME"], ignore_errors=True)
