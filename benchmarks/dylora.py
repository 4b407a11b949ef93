"""A DyLoRA of rank 8 against a LoRA trained at each rank alone: what each takes off the loss, and what all of it costs."""

from __future__ import annotations

import os
import sys

from results import holds, report, table
from training_runs import run

from loratool.training.options import DyLoRA, LoRA

STYLES = os.environ.get("STYLES", "pirate,legal").split(",")
STEPS = int(os.environ.get("STEPS", "40"))
MORE = 1.5
"""A DyLoRA takes so many times the steps of one LoRA."""
LR = float(os.environ.get("LR", "1e-3"))
ALPHA = 16.0
RANKS = [int(rank) for rank in os.environ.get("RANKS", "1,2,3,4,5,6,7,8").split(",")]


def main() -> None:
    rows, costs = [], []
    for style in STYLES:
        dylora = run(style, DyLoRA(rank=8, alpha=ALPHA), steps=round(MORE * STEPS), lr=LR)
        loras = {rank: run(style, LoRA(rank=rank, alpha=ALPHA), steps=STEPS, lr=LR) for rank in RANKS}
        for rank, lora in loras.items():
            share = dylora.gap(rank) / lora.gap()
            rows.append([style, str(rank), f"{lora.before:.3f}", f"{lora.loss:.3f}", f"{dylora.by_rank[rank]:.3f}",
                         f"{share:.0%}", holds(share, least=0.75)])  # fmt: skip
        one = loras[8]
        seconds, tokens = dylora.seconds / one.seconds, dylora.tokens / one.tokens
        eight = sum(lora.seconds for lora in loras.values()) / one.seconds
        costs.append([style, f"{tokens:.2f}", f"{seconds:.2f}", f"{eight:.2f}", holds(tokens, most=1.6)])
    body = "\n\n".join([
        f"SmolLM2-135M, all linear layers, {STEPS} steps of 4 samples and {MORE:g} times as many for the DyLoRA, alpha "
        f"{ALPHA:g} and learning rate {LR:g} for all; loss of 16 samples held out; one thread, fp32. A gap is what "
        "training takes off the base's loss; the target is at least 75% of the gap of the LoRA of that rank.",
        table(["style", "rank", "base", "LoRA of that rank", "the DyLoRA at it", "gap of LoRA's", ""], rows),
        "Cost of the whole curve, in runs of one LoRA of rank 8 (target: at most 1.6):",
        table(["style", "DyLoRA, tokens", "DyLoRA, seconds", "a LoRA for each rank, seconds", ""], costs),
    ])  # fmt: skip
    report("dylora", "DyLoRA: the rank curve of one run", body)


if __name__ == "__main__":
    sys.exit(main())
