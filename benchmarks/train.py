"""loratool's training loop against a bare PEFT and torch loop: loss curve, tokens per second, peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import holds, report, table

KINDS = os.environ.get("KINDS", "lora,qlora").split(",")
STEPS = int(os.environ.get("STEPS", "12"))
ROUNDS = int(os.environ.get("ROUNDS", "2"))
RUN = Path(__file__).parent / "train_run.py"
NAMES = {"lora": "LoRA, fp32", "qlora": "QLoRA: NF4, fp32"}


def main() -> None:
    rows = []
    for kind in KINDS:
        found: dict[str, list[dict[str, Any]]] = {"loratool": [], "peft": []}
        for _ in range(ROUNDS):
            for program, runs in found.items():
                runs.append(one(program, kind))
                print(program, kind, f"{speed(runs[-1:], 'cpu'):.0f} tokens per processor second", flush=True)
        ours, theirs = found["loratool"], found["peft"]
        curves = [[step["loss"] for step in runs[0]["steps"]] for runs in (theirs, ours)]
        apart = max(abs(a - b) / a for a, b in zip(*curves, strict=True))
        faster, larger = speed(ours, "cpu") / speed(theirs, "cpu"), peak(ours) / peak(theirs)
        rows.append([
            NAMES[kind],
            f"{curves[0][0]:.3f} to {curves[0][-1]:.3f}",
            f"{apart:.1e}: {holds(apart, most=1e-3)}",
            f"{speed(ours, 'wall'):.0f} / {speed(theirs, 'wall'):.0f}",
            f"{speed(ours, 'cpu'):.0f} / {speed(theirs, 'cpu'):.0f}",
            f"{faster:.2f}: {holds(faster, least=1)}",
            f"{peak(ours) / 2**30:.2f} / {peak(theirs) / 2**30:.2f} GiB",
            f"{larger:.2f}: {holds(larger, most=1)}",
        ])  # fmt: skip
    body = "\n\n".join([
        f"SmolLM2-135M, rank 8 on all linear layers, {STEPS} steps of 4 pirate chats; the same batches, factors to begin "
        "with, AdamW, schedule and clipping; one thread; medians of steps over "
        f"{ROUNDS} processes each, in turn. loratool's loop makes logits of the tokens alone that count, which is part of its "
        "speed and its memory; the peak is that of the steps, loading left out. Targets: the same loss (1e-3), at least as "
        "quick, at most as much memory.",
        table(["", "loss", "largest relative difference of a step's loss", "tokens/s, loratool / PEFT",
               "tokens per second of processor time", "ratio of these", "peak memory", "ratio"], rows),
    ])  # fmt: skip
    report("train", "Training against PEFT", body)


def one(program: str, kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, RUN, program, kind, str(STEPS)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed(runs: list[dict[str, Any]], clock: str) -> float:
    """Tokens per second of ``wall`` or ``cpu`` time: the median over all steps but each run's first."""
    return statistics.median(step["tokens"] / step[clock] for run in runs for step in run["steps"][1:])


def peak(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["peak"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
