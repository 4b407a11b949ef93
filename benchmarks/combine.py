"""combine against PEFT's add_weighted_adapter, and extract against the change that was made, on SmolLM2."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp()

import numpy as np
import torch
from models import DATA, EXAMPLES, smollm2
from peft import PeftModel
from results import holds, report, table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loratool
from loratool.formats.read import read_adapter

WEIGHTS = {"pirate": 0.7, "other": -0.4}
DENSITY = 0.5
METHODS: dict[str, dict[str, float]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": DENSITY},
    "magnitude-prune": {"density": DENSITY},
}
DRAWING = ["dare-linear", "dare-ties"]
SIGNIFICANCE = 0.001
PREFIX = "base_model.model."
SCALING = 4.0


def main() -> None:
    work = DATA / "combine"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    base = smollm2()
    model, adapters = wrapped(base, work)
    combined = table(
        ["method", "largest relative difference of a module's delta", "1e-5", "loratool", "PEFT", "PEFT / loratool"],
        combine_rows(model, adapters, work),
    )
    drawn = table(["method", "numbers", "distance", "at most", ""], dare_rows(model, adapters, work))
    extracted = table(["figure", "measured", "target", ""], extract_rows(base, work))
    note = "Seconds are those of the call, with the file written by loratool, and adapters loaded before by PEFT."
    of_dare = (
        "dare draws by chance, so its numbers cannot be PEFT's; the distance is that of Kolmogorov and Smirnov between the "
        f"numbers of all factors, which two draws of one distribution exceed in {SIGNIFICANCE:.1%} of cases:"
    )
    body = f"{combined}\n\n{note}\n\n{of_dare}\n\n{drawn}\n\nA trained LoRA merged into its base, and extracted again:"
    report("combine", "Adapters combined, and extracted from models", f"{body}\n\n{extracted}")
    shutil.rmtree(work)


def wrapped(base: Path, work: Path) -> tuple[Any, dict[str, Path]]:
    """The model with the adapters beside it in PEFT, and where they lie."""
    adapters = {"pirate": EXAMPLES / "pirate", "other": another(work / "other")}
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapters["pirate"], adapter_name="pirate")
    model.load_adapter(adapters["other"], "other")
    return model, adapters


def combine_rows(model: Any, adapters: dict[str, Path], work: Path) -> list[list[str]]:
    rows = []
    for method, options in METHODS.items():
        started = time.perf_counter()
        model.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), method, combination_type=method.replace("-", "_"), **options
        )
        theirs = time.perf_counter() - started
        started = time.perf_counter()
        result = loratool.combine(
            [(adapters[name], weight) for name, weight in WEIGHTS.items()], method, out=work / f"{method}.st", **options
        )
        ours = time.perf_counter() - started
        found, worst = deltas(result.out), 0.0
        for module, delta in found.items():
            expected = model.get_submodule(f"{PREFIX}{module}").get_delta_weight(method).double()
            worst = max(worst, float((delta - expected).norm() / expected.norm()))
        rows.append(
            [
                method,
                f"{worst:.1e}",
                holds(worst, most=1e-5),
                f"{ours:.2f} s",
                f"{theirs:.2f} s",
                f"{theirs / ours:.1f}",
            ]
        )
    return rows


def dare_rows(model: Any, adapters: dict[str, Path], work: Path) -> list[list[str]]:
    """The numbers that the dare methods draw, beside those that PEFT draws."""
    rows = []
    for method in DRAWING:
        torch.manual_seed(0)
        model.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), method, combination_type=method.replace("-", "_"), density=DENSITY
        )
        pairs = [(adapters[name], weight) for name, weight in WEIGHTS.items()]
        result = loratool.combine(pairs, method, density=DENSITY, out=work / f"{method}.st")
        ours = {name: tensor.flatten().double() for name, tensor in load_file(result.out).items()}
        theirs = {name: model.get_parameter(name.replace(".weight", f".{method}.weight")) for name in ours}
        pooled = [
            torch.cat(list(ours.values())),
            torch.cat([theirs[name].detach().flatten().double() for name in ours]),
        ]
        distance, numbers = ks_distance(*(numbers.numpy() for numbers in pooled)), len(pooled[0])
        most = math.sqrt(-math.log(SIGNIFICANCE / 2) / numbers)  # Smirnov 1948, for two samples of equal size
        rows.append([method, f"{numbers:,}", f"{distance:.1e}", f"{most:.1e}", holds(distance, most=most)])
    return rows


def ks_distance(left: np.ndarray, right: np.ndarray) -> float:
    """The largest difference of two empirical distribution functions."""
    places = np.sort(np.concatenate([left, right]))
    shares = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())


def another(folder: Path) -> Path:
    """A random adapter of the same modules as the pirate's, and of the same norms."""
    shutil.copytree(EXAMPLES / "pirate", folder)
    generator, file = torch.Generator().manual_seed(0), folder / "adapter_model.safetensors"
    factors = load_file(file)
    save_file(
        {name: torch.randn(t.shape, generator=generator) * t.std() for name, t in factors.items()},
        file,
        {"format": "pt"},
    )
    return folder


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """What an adapter whose scaling is 1 adds to each module, fp64."""
    factors = {name.removeprefix(PREFIX): tensor.double() for name, tensor in load_file(file).items()}
    modules = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    return {module: factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"] for module in modules}


def extract_rows(base: Path, work: Path) -> list[list[str]]:
    """The pirate merged into an fp32 copy of the model, and taken from the difference again."""
    wide = work / "fp32"
    wide.mkdir()
    shutil.copyfile(base / "config.json", wide / "config.json")
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    tuned = loratool.merge(EXAMPLES / "pirate", into=wide, out=work / "tuned").out
    out = work / "extracted.st"
    words = ["extract", str(tuned), "--base", str(wide), "--rank", "4", "--out", str(out)]
    wall, peak = measured([sys.executable, "-m", "loratool", *words])
    expected, worst = deltas(EXAMPLES / "pirate" / "adapter_model.safetensors"), 0.0
    for module, delta in deltas(out).items():
        exact = SCALING * expected[module]
        worst = max(worst, float((delta - exact).norm() / exact.norm()))
    size = (wide / "model.safetensors").stat().st_size
    return [
        ["largest relative error of a module's rank-4 change, fp32", f"{worst:.1e}", "1e-3", holds(worst, most=1e-3)],
        ["the error that the file states, of all modules", f"{read_adapter(out).facts['lineage']['lost']:.1e}", "", ""],
        ["the whole command", f"{wall:.1f} s", "", ""],
        ["its peak memory, for two models of", f"{peak / 2**20:.0f} MiB, {size / 2**20:.0f} MiB each", "", ""],
    ]


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command, started by a small process: its peak counts that of whoever starts it."""
    code = f"import json, processes; r = processes.run({command!r}); print(json.dumps([r.wall, r.peak]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    wall, peak = json.loads(done.stdout)
    return wall, peak


if __name__ == "__main__":
    main()
    shutil.rmtree(os.environ["LORATOOL_HOME"], ignore_errors=True)
