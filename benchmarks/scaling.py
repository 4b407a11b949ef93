"""What each further gigabyte costs, and that memory does not grow: the 1.1 B shape against one five times larger."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from models import DATA, LAYERS, llama, lora
from processes import in_turn, peak, run, wall
from results import holds, report, table

ROUNDS = int(os.environ.get("ROUNDS", "3"))
LARGE = 121
"""Layers that make the model five times larger, 11 GB."""

LORATOOL = [sys.executable, "-m", "loratool"]


def main() -> None:
    os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(dir=DATA)
    sizes, times, peaks = [], {"cp": [], "cp, sync": [], "loratool": []}, []
    for layers in (LAYERS, LARGE):
        base, adapter, out = llama(layers), lora("all", layers), DATA / "out"
        name = f"llama-{layers}"
        run([*LORATOOL, "base", "add", name, str(base)])
        clear = partial(shutil.rmtree, out, True)
        merge = [*LORATOOL, "merge", str(adapter), "--into", name, "--out", str(out)]
        runs = in_turn(
            {
                "cp": (clear, partial(run, ["cp", "-r", str(base), str(out)])),
                "cp, sync": (clear, partial(run, ["sh", "-c", f"cp -r {base} {out} && sync -f {out}"])),
                "loratool": (clear, partial(run, merge)),
            },
            ROUNDS,
            sorted(base.glob("*.safetensors")),
        )
        clear()
        sizes.append(sum(file.stat().st_size for file in base.iterdir()) / 1e9)
        peaks.append(peak(runs["loratool"]))
        for who, measured in runs.items():
            times[who].append(wall(measured))
    further = sizes[1] - sizes[0]
    cp, durable, ours = ((times[who][1] - times[who][0]) / further for who in ("cp", "cp, sync", "loratool"))
    rows = [
        [f"{size:.1f} GB", *(f"{times[who][i]:.2f} s" for who in ("cp", "cp, sync", "loratool")), f"{peaks[i]:.0f} MiB"]
        for i, size in enumerate(sizes)
    ]
    body = table(["model", "cp -r", "cp -r, made durable", "loratool merge", "peak memory"], rows) + "\n\n"
    body += table(
        ["figure", "measured", "target", ""],
        [
            ["each further GB, cp", f"{cp:.2f} s", "", ""],
            ["each further GB, cp made durable", f"{durable:.2f} s", "", ""],
            [
                "each further GB, loratool",
                f"{ours:.2f} s = {ours / cp:.2f} x cp",
                "1.25 x cp",
                holds(ours / cp, most=1.25),
            ],
            ["peak memory", f"{max(peaks):.0f} MiB", "450 MiB", holds(max(peaks), most=450)],
            ["growth of it", f"{peaks[1] - peaks[0]:.0f} MiB", "60 MiB", holds(peaks[1] - peaks[0], most=60)],
        ],
    )
    report("scaling", "Scaling: a model five times larger", body)
    shutil.rmtree(Path(os.environ["LORATOOL_HOME"]), ignore_errors=True)


if __name__ == "__main__":
    main()
