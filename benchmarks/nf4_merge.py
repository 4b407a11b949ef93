"""What trained adapters keep when they are merged into NF4 weights: by loratool, by PEFT, and by the ways that need more.

    python benchmarks/nf4_merge.py [--record] [NAME]...

The recovered share is (L_base - L_merged) / (L_base - L_beside), where L_beside is the loss of the NF4 base with the adapter
beside its weights. Every model is computed in fp32 from its stored weights as loratool decodes them, whose bits are those of
bitsandbytes (tests/test_nf4.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp()

import torch
import trained
from models import DATA, smollm2
from results import holds, report, table
from trained import RECIPES, TEXTS, split

import loratool
from loratool.checkpoint.model import Checkpoint
from loratool.formats.read import read_adapter
from loratool.merging.apply import BaseIdentity, apply_merge
from loratool.merging.plan import WeightedAdapter, plan_merge
from loratool.running.data import TokenizedSample, read_data, tokenize_data
from loratool.running.loss import score
from loratool.running.model import beside, load_config, load_model, load_tokenizer, quiet_libraries
from loratool.weights.storages import quantized_names, stored_weight
from loratool.weights.stored import StoredWeight

TRAINED_LINES = 24
"""Of the lines that an adapter was trained on, so many are scored."""

SEEDS = (None, "0" * 64, "1" * 64)
"""Of merges without calibration; the first is made from what is merged."""

OURS, PLAIN = "loratool merge", "every code rounded by chance"
CALIBRATED, QUANTIZED = "loratool merge --calibrate", "loratool merge --quantize nf4 (dense base)"
LEAST: Mapping[str, float] = {OURS: 0.97, CALIBRATED: 0.98, QUANTIZED: 0.98}
"""Targets for the recovered share."""

SHARES = DATA
PICTURE = Path(__file__).parent.parent / "docs" / "nf4-merge.svg"

UNSEEN = ("pirate-all", "terse", "terse-mlp")
"""Adapters that no constant was chosen by."""

SETS = ("trained", "held out", "neutral")
CALIBRATION = TEXTS / "everyday.txt"


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one model, in nats: on lines that the adapter was trained on, on lines kept from it, and on neutral text."""

    trained: float
    held_out: float
    neutral: float


class Scorer:
    """One dense fp32 model, whose weights are exchanged for those of whatever is scored."""

    def __init__(self, dense: Path) -> None:
        with quiet_libraries():
            self._tokenizer = load_tokenizer(dense)
            self._model = load_model(dense, load_config(dense), "cpu")

    def load(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        parameters = dict(self._model.named_parameters())
        scales = {
            part
            for name in quantized_names(checkpoint)
            for part in checkpoint.tensors
            if part != name and part.startswith(f"{name}.")
        }
        for name in checkpoint.tensors.keys() - scales:
            weight = stored_weight(checkpoint, name)
            assert weight is not None
            parameters[name].data.copy_(decoded(weight).view(parameters[name].shape))

    def losses(self, name: str) -> Losses:
        lines, held_out = split(name)
        with tempfile.TemporaryDirectory() as scratch:
            files = []
            for part, content in (("trained", lines[:TRAINED_LINES]), ("held_out", held_out)):
                files.append(Path(scratch) / f"{part}.jsonl")
                files[-1].write_text("\n".join(content), encoding="utf-8")
            return Losses(*(self._loss(file) for file in (*files, TEXTS / "neutral.txt")))

    def beside(self, name: str) -> Losses:
        with beside(self._model, read_adapter(trained.adapter(name)), "cpu"):
            return self.losses(name)

    def merged_by_peft(self, name: str, image: Path) -> Losses:
        """Of the model that PEFT merges: dequantized, added, quantized to the nearest again."""
        import peft

        with quiet_libraries():
            model = load_model(image, load_config(image), "cpu")
            merged = peft.PeftModel.from_pretrained(model, trained.adapter(name)).merge_and_unload()
        parameters = dict(self._model.named_parameters())
        for key, parameter in merged.named_parameters():
            parameters[key].data.copy_(dequantized(parameter).view(parameters[key].shape))
        return self.losses(name)

    def _loss(self, file: Path) -> float:
        samples: list[TokenizedSample] = tokenize_data(read_data(file), self._tokenizer, 256)
        return score(self._model, samples, batch_size=16, device="cpu", progress=lambda count: None).loss


def decoded(weight: StoredWeight) -> torch.Tensor:
    rows = range(weight.rows)
    parts = []
    for info, start, stop in weight.extents(rows):
        with open(info.file, "rb") as stream:
            stream.seek(start)
            parts.append(torch.frombuffer(bytearray(stream.read(stop - start)), dtype=torch.uint8))
    out = torch.empty(weight.shape)
    weight.load("cpu").decode(rows, tuple(parts), out)
    return out


def dequantized(parameter: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    state = getattr(parameter, "quant_state", None)
    return parameter.data if state is None else bnb.dequantize_4bit(parameter.data, state).float()


@contextmanager
def every_step_short() -> Iterator[None]:
    """Plain stochastic rounding, for comparison: all codes of every row carry the update."""
    from loratool.weights import four_bit
    from loratool.weights.coarse.short_steps import ShortRule

    rules = four_bit.SHORT_RULES
    vars(four_bit)["SHORT_RULES"] = {"nf4": (ShortRule(math.inf, math.inf),)}
    try:
        yield
    finally:
        vars(four_bit)["SHORT_RULES"] = rules


@dataclass(frozen=True, slots=True)
class Way:
    """One merge of an adapter: what it is called, and its losses."""

    name: str
    losses: Losses
    changed: float | None = None


def ways(name: str, scorer: Scorer, dense: Path, image: Path) -> Iterator[Way]:
    """Every way of merging an adapter, those without calibration under several seeds."""
    adapter, out = trained.adapter(name), DATA / f"out-nf4-merge-{name}"

    def merged(**options: Any) -> float | None:
        shutil.rmtree(out, ignore_errors=True)
        result = loratool.merge([adapter], **{"into": image} | options, out=out)
        scorer.load(out)
        return None if result.delivery is None else result.delivery.changed

    def merged_with(seed: str | None) -> float | None:
        shutil.rmtree(out, ignore_errors=True)
        plan = plan_merge([WeightedAdapter(read_adapter(adapter))], Checkpoint.open(image), seed)
        delivery = apply_merge(plan, out, BaseIdentity("image")).manifest.delivery_of_all
        scorer.load(out)
        return None if delivery is None else delivery.changed

    for seed in SEEDS:
        changed = merged_with(seed)
        yield Way(OURS, scorer.losses(name), changed)
    with every_step_short():
        for seed in SEEDS[1:]:
            changed = merged_with(seed)
            yield Way(PLAIN, scorer.losses(name), changed)
    changed = merged(calibrate=CALIBRATION)
    yield Way(CALIBRATED, scorer.losses(name), changed)
    merged(into=dense, quantize="nf4")
    yield Way(QUANTIZED, scorer.losses(name))
    yield Way("PEFT merge_and_unload", scorer.merged_by_peft(name, image))
    shutil.rmtree(out, ignore_errors=True)


def share(base: float, merged: float, beside: float) -> float:
    return (base - merged) / (base - beside)


def rows(base: Losses, whole: Losses, found: list[Way]) -> Iterator[list[str]]:
    """The rows of an adapter's table."""
    for title, losses in (("NF4 base", base), ("NF4 base, adapter beside it", whole)):
        yield [title, *shown_losses(losses), "", "", "", "", ""]
    for title in dict.fromkeys(way.name for way in found):
        each = [way for way in found if way.name == title]
        on_trained = [share(base.trained, way.losses.trained, whole.trained) for way in each]
        on_held_out = [share(base.held_out, way.losses.held_out, whole.held_out) for way in each]
        neutral = max(way.losses.neutral / whole.neutral for way in each)
        target = LEAST.get(title)
        changed = each[0].changed
        yield [
            title,
            *shown_losses(each[0].losses),
            shown(on_trained),
            shown(on_held_out),
            f"{neutral - 1:+.1%}",
            "" if changed is None else f"{changed:.1%}",
            "" if target is None else f"{target}, 10%: {verdict(on_trained, target, neutral)}",
        ]


def shown_losses(losses: Losses) -> list[str]:
    return [f"{loss:.3f}" for loss in (losses.trained, losses.held_out, losses.neutral)]


def verdict(shares: list[float], least: float, neutral: float) -> str:
    kept = holds(statistics.mean(shares), least=least)
    return kept if neutral <= 1.1 else "**does not hold**"


def shown(shares: list[float]) -> str:
    mean = f"{statistics.mean(shares):.3f}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.3f} to {max(shares):.3f})"


def draw() -> None:
    """Bars of the recovered share on the lines trained on, by adapter and way, of all adapters measured so far."""
    from loratool.library.reporting.picture import drawn

    files = {name: SHARES / f"nf4-merge-{name}.json" for name in RECIPES}
    pictured = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    with drawn(PICTURE, force=True) as figure:
        axes = figure.add_subplot()
        titles = list(dict.fromkeys(title for ways in pictured.values() for title in ways))
        width = 0.8 / len(titles)
        for place, title in enumerate(titles):
            means = [statistics.mean(ways[title]) for ways in pictured.values()]
            at = [number - 0.4 + width * (place + 0.5) for number in range(len(pictured))]
            axes.bar(at, [max(mean, 0.0) for mean in means], width * 0.9, label=title)
        axes.axhline(1, color="grey", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(pictured)), [f"{name}\nr={RECIPES[name].rank}" for name in pictured], fontsize=7)
        axes.set_ylabel("recovered share of the fine-tune")
        axes.set_ylim(0, 1.35)
        axes.legend(loc="upper left", fontsize=7, ncols=2)


def measure(name: str, scorer: Scorer, dense: Path, image: Path) -> None:
    """Measure every way of merging one adapter, and report it."""
    scorer.load(image)
    base, whole = scorer.losses(name), scorer.beside(name)
    found: list[Way] = []
    for way in ways(name, scorer, dense, image):
        shares = [share(getattr(base, of), getattr(way.losses, of), getattr(whole, of)) for of in Losses.__slots__]
        print(f"  {name:12s} {way.name:44s} {shares[0]:.4f}  {shares[1]:.4f}", flush=True)
        found.append(way)
    columns = [f"loss, {each}" for each in SETS]
    columns = ["", *columns, "recovered, trained", "recovered, held out", "neutral", "codes changed", "target"]
    unseen = " No constant was chosen by this adapter." if name in UNSEEN else ""
    body = table(columns, list(rows(base, whole, found))) + (
        f"\n\n{RECIPES[name].describe()}, SmolLM2-135M-Instruct.{unseen} Ways that round by chance: the mean of several seeds, "
        "the least and the most in brackets; the losses and the codes changed are those of the first, which a user gets. "
        "neutral: the loss on everyday prose beside that of the base with the adapter, of the worst seed. Calibrated on "
        f"texts/{CALIBRATION.name}, which is none of the texts that are scored. {TRAINED_LINES} of the lines trained on are "
        f"scored, and {trained.HELD_OUT} others."
    )
    report(f"nf4_merge_{name}", f"Merging into NF4: what is left of the adapter {name}", body, "nf4_merge")
    each = {
        title: [share(base.trained, way.losses.trained, whole.trained) for way in found if way.name == title]
        for title in dict.fromkeys(way.name for way in found)
    }
    (SHARES / f"nf4-merge-{name}.json").write_text(json.dumps(each))


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.startswith("-")] or list(RECIPES)
    dense, image = smollm2(), DATA / "smollm2-nf4"
    if not image.exists():
        loratool.quantize(dense, out=image)
    scorer = Scorer(dense)
    for name in names:
        measure(name, scorer, dense, image)
    if "--record" in sys.argv:
        draw()
    shutil.rmtree(os.environ["LORATOOL_HOME"], ignore_errors=True)


if __name__ == "__main__":
    main()
