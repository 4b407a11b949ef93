"""One training run in a process of its own, loratool's or a bare PEFT and torch loop; prints its figures as JSON.

    python train_run.py loratool|peft lora|qlora STEPS

Both take the same batches, the same factors to begin with, the same optimizer, schedule and clipping.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from models import smollm2
from training_runs import BATCH, SEED, WARMUP, samples

from loratool.formats.adapter_draft import Draft
from loratool.formats.write import write_peft
from loratool.running.model import load_config, load_model, quiet_libraries
from loratool.training.batches import Row, collate
from loratool.training.loop import Training, batches
from loratool.training.methods import attach
from loratool.training.optimizer import make_optimizer
from loratool.training.options import DEFAULT_LR, LoRA
from loratool.training.processes import Processes
from loratool.training.recipe import Recipe

OPTIONS = LoRA(rank=8)
STYLE = "pirate"


def main() -> None:
    program, kind, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    train, _ = samples(STYLE)
    recipe = Recipe(
        base="smollm2", base_fingerprint="", data=STYLE, data_sha256="", samples=len(train), adapter=OPTIONS,
        steps=steps, batch_size=BATCH, lr=DEFAULT_LR, warmup=WARMUP, seed=SEED,
    )  # fmt: skip
    with quiet_libraries():
        model = load_model(smollm2(), load_config(smollm2()), "cpu", quantize=kind == "qlora")
        begin = ours if program == "loratool" else theirs
        make_step = begin(model, recipe, train)
        forget_the_loading()
        found: list[dict[str, float]] = []
        for rows in islice(batches(train, recipe), steps):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = make_step(rows)
            found.append({
                "loss": loss,
                "tokens": sum(row.tokens for row in rows),
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            })  # fmt: skip
    print(json.dumps({"steps": found, "peak": peak_since()}))


def forget_the_loading() -> None:
    """Give what loading left over back to the system, and begin to measure the peak anew (`proc(5)`, clear_refs).

    How much transformers takes while it loads and quantizes differs by a tenth from run to run of the same program.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_since() -> int:
    """Bytes: the most that this process has had in memory since."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def ours(model: Any, recipe: Recipe, train: Any) -> Callable[[Sequence[Row]], float]:
    adaptation = attach(model, OPTIONS, seed=SEED)
    optimizer = make_optimizer(adaptation.parameters(), recipe, paged=False)
    training = Training(recipe, model, adaptation, optimizer, Processes("cpu"), train, [])
    return lambda rows: training.make_step(rows).loss


def theirs(model: Any, recipe: Recipe, train: Any) -> Callable[[Sequence[Row]], float]:
    import peft

    begun = attach(model, OPTIONS, seed=SEED)
    with tempfile.TemporaryDirectory() as parent:
        with Draft(Path(parent)) as draft:
            write_peft(begun.adapter(draft, "begun"), Path(parent, "begun"))
        begun.detach()
        wrapped = peft.PeftModel.from_pretrained(model, Path(parent, "begun"), is_trainable=True).train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.learning_rate(step) / recipe.lr)

    def make_step(rows: Sequence[Row]) -> float:
        loss = wrapped(**collate(rows), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return make_step


if __name__ == "__main__":
    main()
