"""AdaLoRA at an average rank of 4 against LoRA of rank 4: same steps, seeds and samples, each at the best of the same rates."""

from __future__ import annotations

import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from results import FILE, holds, report, table
from training_runs import Run, run

from loratool.training.options import AdaLoRA, LoRA

STYLES = os.environ.get("STYLES", "pirate,legal").split(",")
STEPS = int(os.environ.get("STEPS", "32"))
RATES = [float(rate) for rate in os.environ.get("RATES", "1e-3,3e-3,4e-3,6e-3").split(",")]
SEEDS = [int(seed) for seed in os.environ.get("SEEDS", "1,2,3,4,5,6").split(",")]
RANK = 4
PLOT = FILE.parent / "adalora-ranks.png"


def main() -> None:
    rows, best = [], {}
    for style in STYLES:
        loras = {rate: runs(style, LoRA(rank=RANK), rate) for rate in RATES}
        adas = {rate: runs(style, AdaLoRA(rank=RANK), rate) for rate in RATES}
        rows += [[style, f"{rate:g}", each_gap(loras[rate]), each_gap(adas[rate]), "", ""] for rate in RATES]
        lora, ada = (max(found.values(), key=mean_gap) for found in (loras, adas))
        best[style] = ada[0]
        ends = [run.figures[-1]["budget"] for run in ada]
        wanted = RANK * len(ada[0].figures[-1]["ranks"])
        share = mean_gap(ada) / mean_gap(lora)
        rows.append([style, "best", f"{mean_gap(lora):.3f}", f"{mean_gap(ada):.3f}",
                     f"{share:.1%} of LoRA's: {holds(share, least=1)}",
                     f"{ends[0]} of {wanted}: {holds(max(abs(end - wanted) for end in ends), most=0)}"])  # fmt: skip
    body = "\n\n".join([
        f"SmolLM2-135M, all linear layers, {STEPS} steps of 4 samples, AdaLoRA from rank {AdaLoRA(rank=RANK).init_r} to an "
        f"average of {RANK}, default schedule; one thread, fp32. The gap is what training takes off the loss of 16 samples "
        f"held out: the mean over {len(SEEDS)} seeds, and each of them. A seed decides the factors, the samples held out and the "
        "order of the others.",
        table(["style", "learning rate", f"LoRA r={RANK}: gap", "AdaLoRA: gap", "target: LoRA's at its best rate",
               "ranks at the end"], rows),
        "Ranks at the end, mean over the 30 layers, of the first seed: "
        + "; ".join(f"{style}: {_by_kind(run)}" for style, run in best.items()) + ".",
        f"![Ranks over time]({PLOT.name})" if _plot(best) else "",
    ])  # fmt: skip
    report("adalora", "AdaLoRA: ranks shared out", body.strip())


def runs(style: str, options: LoRA | AdaLoRA, rate: float) -> list[Run]:
    """One for each seed."""
    return [run(style, options, steps=STEPS, lr=rate, seed=seed) for seed in SEEDS]


def mean_gap(found: list[Run]) -> float:
    return statistics.mean(each.gap() for each in found)


def each_gap(found: list[Run]) -> str:
    return f"{mean_gap(found):.3f} ({', '.join(f'{each.gap():.3f}' for each in found)})"


def _by_kind(found: Run) -> str:
    kinds = defaultdict(list)
    for module, rank in found.figures[-1]["ranks"].items():
        kinds[module.rsplit(".", 1)[-1]].append(rank)
    return ", ".join(f"{kind} {sum(ranks) / len(ranks):.1f}" for kind, ranks in kinds.items())


def _plot(best: dict[str, Run]) -> Path | None:
    """A heat map for each style: the rank of each module at the end, by layer and kind."""
    if "--record" not in sys.argv:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(best), 2, figsize=(10, 2.6 * len(best)), squeeze=False, layout="constrained")
    for (style, found), (over_time, at_end) in zip(best.items(), axes, strict=True):
        budgets = [figures["budget"] for figures in found.figures]
        over_time.step(range(1, len(budgets) + 1), budgets, where="post")
        over_time.set(title=f"{style}: total rank", xlabel="step", ylim=(0, None))
        ranks = found.figures[-1]["ranks"]
        kinds = list(dict.fromkeys(module.rsplit(".", 1)[-1] for module in ranks))
        grid = [[rank for module, rank in ranks.items() if module.endswith(f".{kind}")] for kind in kinds]
        image = at_end.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
        at_end.set(title=f"{style}: rank at the end", xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds)
        figure.colorbar(image, ax=at_end)
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})
    return PLOT


if __name__ == "__main__":
    sys.exit(main())
