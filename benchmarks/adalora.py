"""AdaLoRA at an average rank of 4 against LoRA of rank 4: same steps, each at the best of the same learning rates."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

from results import FILE, holds, report, table
from training_runs import Run, run

from loratool.training.options import AdaLoRA, LoRA

STYLES = os.environ.get("STYLES", "pirate,legal").split(",")
STEPS = int(os.environ.get("STEPS", "40"))
RATES = [float(rate) for rate in os.environ.get("RATES", "1e-3,3e-3,1e-2").split(",")]
RANK = 4
PLOT = FILE.parent / "adalora-ranks.png"


def main() -> None:
    rows, best = [], {}
    for style in STYLES:
        loras = {rate: run(style, LoRA(rank=RANK), steps=STEPS, lr=rate) for rate in RATES}
        adas = {rate: run(style, AdaLoRA(rank=RANK), steps=STEPS, lr=rate) for rate in RATES}
        rows += [[style, f"{rate:g}", f"{loras[rate].loss:.3f}", f"{adas[rate].loss:.3f}", "", ""] for rate in RATES]
        lora, best[style] = (min(runs.values(), key=lambda each: each.loss) for runs in (loras, adas))
        share = best[style].gap() / lora.gap()
        end = best[style].figures[-1]["budget"]
        wanted = RANK * len(best[style].figures[-1]["ranks"])
        rows.append([style, "best", f"{lora.loss:.3f}", f"{best[style].loss:.3f}",
                     f"{share:.1%} of LoRA's gap: {holds(share, least=1)}",
                     f"{end} of {wanted}: {holds(abs(end - wanted), most=0)}"])  # fmt: skip
    body = "\n\n".join([
        f"SmolLM2-135M, all linear layers, {STEPS} steps of 4 samples, AdaLoRA from rank 6 to an average of {RANK}, default "
        "schedule; loss of 16 samples held out; one thread, fp32.",
        table(["style", "learning rate", f"LoRA r={RANK}", "AdaLoRA", "gap (target: LoRA's)", "ranks at the end"], rows),
        "Ranks at the end, mean over the 30 layers: " + "; ".join(f"{s}: {_by_kind(r)}" for s, r in best.items()) + ".",
        f"![Ranks over time]({PLOT.name})" if _plot(best) else "",
    ])  # fmt: skip
    report("adalora", "AdaLoRA: ranks shared out", body.strip())


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
