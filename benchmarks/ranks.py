"""Ranks: truncation against the optimum and against full SVDs, a 7 B adapter of rank 64, AdaLoRA against PEFT."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from models import DATA
from processes import in_turn, peak, run, wall
from results import holds, report, table

ROUNDS = int(os.environ.get("ROUNDS", "3"))
HIDDEN, INTERMEDIATE, LAYERS, RANK = 4096, 11_008, 32, 64
"""The shape of Llama 7 B, and the rank of the adapter for it."""

MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
LORATOOL = [sys.executable, "-m", "loratool"]


def main() -> None:
    out = DATA / "ranks"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(dir=DATA)
    command = large(out)
    # In a process of its own: one counts the memory of that which started it as its own peak, so this one stays small.
    script = Path(__file__).parent / "rank_figures.py"
    found = json.loads(subprocess.run([sys.executable, script, out], check=True, stdout=subprocess.PIPE).stdout)
    body = table(["figure", "measured", "target", ""], [*found["figures"], *command])
    times = table(["layer", "full SVD", "through QR of the factors", "ratio"], found["times"])
    report("ranks", "Ranks: truncate and prune", f"{body}\n\nOne module's decomposition:\n\n{times}")
    shutil.rmtree(out)
    shutil.rmtree(os.environ["LORATOOL_HOME"])


def large(out: Path) -> list[list[str]]:
    """The whole command on an adapter of 640 MB."""
    source, cut = DATA / f"lora-7b-r{RANK}.safetensors", out / "large.safetensors"
    if not source.exists():
        code = f"import ranks; ranks.build_large({str(source)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    command = [*LORATOOL, "truncate", str(source), "--rank", "16", "--out", str(cut), "--force"]
    runs = in_turn({"7 B, rank 64 to 16": (lambda: None, partial(run, command))}, ROUNDS, [source])
    seconds, memory = wall(runs["7 B, rank 64 to 16"]), peak(runs["7 B, rank 64 to 16"])
    return [
        ["7 B adapter of rank 64 to 16, the whole command", f"{seconds:.1f} s", "60 s", holds(seconds, most=60)],
        ["peak memory of it", f"{memory:.0f} MiB", "600 MiB", holds(memory, most=600)],
    ]


def build_large(path: str) -> None:
    """A random fp32 LoRA for every linear layer of a 7 B Llama."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(LAYERS):
        for module, (rows, columns) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.005
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear"}
    save_file(tensors, path, {"format": "pt", "adapter_config": json.dumps(config)})


if __name__ == "__main__":
    main()
