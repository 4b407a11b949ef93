"""The figures of `ranks.py` that are computed within a process; prints them as JSON."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp()

import numpy as np
import torch
from models import EXAMPLES, smollm2
from peft import AdaLoraConfig, PeftModel, get_peft_model
from processes import median
from results import holds
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loratool
from loratool.formats.read import read_adapter
from loratool.ranks.factored_svd import factored_svd

THREADS = torch.get_num_threads()
ROUNDS = int(os.environ.get("ROUNDS", "3"))
SHAPES = [(2048, 2048, 16), (5632, 2048, 16), (4096, 4096, 64)]
"""Rows, columns and rank of the layers that are decomposed both ways."""


def main() -> None:
    out = Path(sys.argv[1])
    figures = [*dylora(out), *approximation(out), *adalora(out)]
    print(json.dumps({"figures": figures, "times": against_full_svds()}))


def dylora(out: Path) -> list[list[str]]:
    """Every cut of the example, taken for a DyLoRA, against the forward that each law trains."""
    pirate = EXAMPLES / "pirate"
    trained, read = load_file(pirate / "adapter_model.safetensors"), read_adapter(pirate)
    differing, worst = 0, 0.0
    for law in ("paper", "kohya"):
        for rank in range(1, read.rank + 1):
            cut = out / f"{law}-{rank}"
            loratool.truncate(pirate, rank=rank, scaling=law, out=cut)
            tensors = load_file(cut / "adapter_model.safetensors")
            for name, tensor in trained.items():
                leading = tensor[:rank] if "lora_A" in name else tensor[:, :rank]
                differing += int((tensors[name] != leading).sum())
            scale = read.alpha / rank if law == "paper" else read.alpha / read.rank * math.sqrt(read.rank / rank)
            for module, delta in deltas_in_peft(cut).items():
                a, b = (trained[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "AB")
                forward = b[:, :rank] @ a[:rank] * scale
                worst = max(worst, float((delta - forward).norm() / forward.norm()))
    return [
        ["DyLoRA: numbers that differ from the leading slices", str(differing), "0", holds(differing, most=0)],
        ["DyLoRA: PEFT's delta from the trained forward", f"{worst:.1e}", "1e-6", holds(worst, most=1e-6)],
    ]


def approximation(out: Path) -> list[list[str]]:
    """Every cut of the trained example by SVD, against the least error that numpy finds in float64."""
    before, worst = dense(EXAMPLES / "pirate"), 0.0
    values = {module: np.linalg.svd(delta, compute_uv=False) for module, delta in before.items()}
    for rank in range(1, read_adapter(EXAMPLES / "pirate").rank):
        loratool.truncate(EXAMPLES / "pirate", rank=rank, out=out / f"svd-{rank}.st")
        for module, delta in dense(out / f"svd-{rank}.st").items():
            best = math.sqrt(float((values[module][rank:] ** 2).sum()))
            worst = max(worst, float(np.linalg.norm(before[module] - delta)) / best - 1)
    return [["SVD: error above the optimum, worst module and rank", f"{worst:.1e}", "1e-5", holds(worst, most=1e-5)]]


def adalora(out: Path) -> list[list[str]]:
    """A random AdaLoRA of SmolLM2: merged, pruned to a third, and that as a LoRA."""
    config = AdaLoraConfig(init_r=12, lora_alpha=32, target_modules=["q_proj", "v_proj"], total_step=10)
    wrapped = get_peft_model(fp32_base(), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(wrapped.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    wrapped.save_pretrained(out / "adalora")
    base = out / "fp32"
    fp32_base().save_pretrained(base)
    merged = loratool.merge([out / "adalora"], into=base, out=out / "merged")
    theirs = PeftModel.from_pretrained(fp32_base(), out / "adalora").merge_and_unload().state_dict()
    ours = load_file(merged.out / "model.safetensors")
    differing = sum(int((theirs[name] != tensor).sum()) for name, tensor in ours.items())
    before, budget, worst = dense_triplets(out / "adalora"), 240, 0.0
    for kind in ("adalora", "lora"):
        result = loratool.prune(out / "adalora", budget=budget, as_=kind, out=out / f"pruned-{kind}")
        kept = kept_triplets(out / "adalora", budget)
        for module, delta in deltas_in_peft(result.out).items():
            expected = sum((before[module][place] for place in kept[module]), torch.zeros_like(delta))
            worst = max(worst, float((delta - expected).norm() / max(float(expected.norm()), 1e-30)))
    off = abs(result.total - budget)
    return [
        ["AdaLoRA: merged fp32 numbers that differ from PEFT's", str(differing), "0", holds(differing, most=0)],
        ["AdaLoRA: pruned and converted, PEFT's delta from that of the kept triplets", f"{worst:.1e}", "1e-6",
         holds(worst, most=1e-6)],
        ["AdaLoRA: kept rank beside the budget", str(off), "0", holds(off, most=0)],
    ]  # fmt: skip


def against_full_svds() -> list[list[str]]:
    """What other tools do with each module: form the dense update and decompose it whole, in fp32."""
    rows = []
    for height, width, rank in SHAPES:
        b, a = factors(height, width, rank)
        torch.set_num_threads(1)  # as truncate does
        factored_svd(b, a)
        ours = median([timed(partial(factored_svd, b, a)) for _ in range(max(ROUNDS, 3))])
        torch.set_num_threads(THREADS)
        theirs = median([timed(partial(full_svd, b, a)) for _ in range(ROUNDS)])
        ratio = theirs / ours
        rows.append(
            [f"{height} x {width}, rank {rank}", f"{theirs:.2f} s", f"{ours * 1e3:.1f} ms",
             f"{ratio:.0f} x, at least 50: {holds(ratio, least=50)}"]
        )  # fmt: skip
    return rows


def factors(height: int, width: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(height, rank, generator=generator), torch.randn(rank, width, generator=generator)


def full_svd(b: torch.Tensor, a: torch.Tensor) -> object:
    return torch.linalg.svd(b @ a, full_matrices=False)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def fp32_base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def deltas_in_peft(adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(fp32_base(), adapter)
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def dense(adapter: Path) -> dict[str, np.ndarray]:
    """The update of each module as numpy computes it in float64."""
    read = read_adapter(adapter)
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(read.file).items()}
    return {
        module: tensors[update.tensors["B"].name] @ tensors[update.tensors["A"].name] * update.scaling
        for module, update in read.ranked.items()
    }


def dense_triplets(adapter: Path) -> dict[str, list[torch.Tensor]]:
    """The update of each triplet of each module, float64."""
    read = read_adapter(adapter)
    tensors = {name: tensor.double() for name, tensor in load_file(read.file).items()}
    found = {}
    for module, update in read.ranked.items():
        a, e, b = (tensors[update.tensors[letter].name] for letter in "AEB")
        found[module] = [torch.outer(b[:, i], a[i] * e[i]) * update.scaling for i in range(len(a))]
    return found


def kept_triplets(adapter: Path, budget: int) -> dict[str, list[int]]:
    """The places of the largest |E| of all modules together."""
    read = read_adapter(adapter)
    tensors = load_file(read.file)
    scores = {module: tensors[update.tensors["E"].name].abs().flatten() for module, update in read.ranked.items()}
    least = torch.cat(list(scores.values())).sort(descending=True).values[budget - 1]
    return {module: (each >= least).nonzero().flatten().tolist() for module, each in scores.items()}


if __name__ == "__main__":
    main()
    shutil.rmtree(os.environ["LORATOOL_HOME"], ignore_errors=True)
