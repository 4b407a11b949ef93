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
                print(program, kind, f"{speed(runs[-1:]):.0f} tokens/s", flush=True)
        ours, theirs = found["loratool"], found["peft"]
        apart = max(abs(a - b) / b for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True))
        faster, larger = speed(ours) / speed(theirs), peak(ours) / peak(theirs)
        rows.append([
            NAMES[kind],
            f"{theirs[0]['losses'][0]:.3f} to {theirs[0]['losses'][-1]:.3f}",
            f"{apart:.1e}: {holds(apart, most=1e-3)}",
            f"{speed(ours):.0f} / {speed(theirs):.0f}",
            f"{faster:.2f}: {holds(faster, least=1)}",
            f"{peak(ours) / 2**30:.2f} / {peak(theirs) / 2**30:.2f} GiB",
            f"{larger:.2f}: {holds(larger, most=1)}",
        ])  # fmt: skip
    body = "\n\n".join([
        f"SmolLM2-135M, rank 8 on all linear layers, {STEPS} steps of 4 pirate chats; the same batches, factors to begin "
        f"with, AdamW, schedule and clipping; {os.environ.get('OMP_NUM_THREADS', 'all')} threads; medians of steps over "
        f"{ROUNDS} processes each, in turn. Targets: the same loss (1e-3), at least as quick, at most as much memory.",
        table(["", "loss", "largest relative difference of a step's loss", "tokens/s, loratool / PEFT", "ratio",
               "peak memory, loratool / PEFT", "ratio"], rows),
    ])  # fmt: skip
    report("train", "Training against PEFT", body)


def one(program: str, kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, RUN, program, kind, str(STEPS)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed(runs: list[dict[str, Any]]) -> float:
    """Tokens per second: the median over all steps but each run's first two."""
    return statistics.median(
        tokens / seconds for run in runs for tokens, seconds in zip(run["tokens"][2:], run["seconds"][2:], strict=True)
    )


def peak(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["peak"] for run in runs)


if __name__ == "__main__":
    sys.exit(main())
