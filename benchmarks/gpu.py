"""A merge on a CUDA device against the same merge by PEFT there, and against what the machine can move.

`sh benchmarks/run_gpu.sh` runs this and the tests marked `gpu`. Without a CUDA device it says so and does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from models import DATA, LAYERS, llama, lora
from processes import Contestant, in_turn, peak, run, spread, wall
from results import report, table

ROUNDS = int(os.environ.get("ROUNDS", "3"))
LARGE = int(os.environ.get("LAYERS", "121"))
LORATOOL = [sys.executable, "-m", "loratool"]
START = "import torch; torch.zeros(1, device='cuda').cpu()"


def main() -> None:
    name = cuda_name()
    if name is None:
        print("There is no CUDA device: nothing is measured.")
        return
    os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(dir=ready(DATA))
    body = f"On one {name}.\n\n"
    for layers in sorted({LAYERS, LARGE}):
        body += against_peft(layers) + "\n\n"
    body += against_bandwidth()
    report("gpu", "On a CUDA device: bf16 Llama shapes, LoRA r=16 on all linear layers", body)
    shutil.rmtree(os.environ["LORATOOL_HOME"])


def ready(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cuda_name() -> str | None:
    """The name of the first CUDA device, asked in another process so that this one holds no memory there."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return answer or None


def against_peft(layers: int) -> str:
    """Whole processes, in turn: loratool on CUDA and on the CPU, PEFT on CUDA, `cp -r`, and starting torch with CUDA."""
    base, adapter = llama(layers), lora("all", layers)
    run([*LORATOOL, "base", "add", f"llama-{layers}", str(base)])
    out = DATA / "out-gpu"
    clear = partial(shutil.rmtree, out, ignore_errors=True)
    merge = [*LORATOOL, "merge", str(adapter), "--into", f"llama-{layers}", "--out", str(out), "--device"]
    peft = [sys.executable, str(Path(__file__).with_name("peft_merge.py")), str(base), str(adapter), str(out), "cuda"]
    contestants: dict[str, Contestant] = {
        "import torch, start CUDA": (clear, partial(run, [sys.executable, "-c", START])),
        "cp -r of the base": (clear, partial(run, ["cp", "-r", str(base), str(out)])),
        "loratool --device cuda": (clear, partial(run, [*merge, "cuda"])),
        "loratool --device cpu": (clear, partial(run, [*merge, "cpu"])),
        "PEFT on cuda": (clear, partial(run, peft)),
    }
    runs = in_turn(contestants, ROUNDS)
    clear()
    ours = wall(runs["loratool --device cuda"])
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9
    rows = [
        [name, f"{wall(measured):.2f} s", spread(measured), f"{peak(measured):.0f} MiB", f"{wall(measured) / ours:.2f}"]
        for name, measured in runs.items()
    ]
    columns = [
        f"{size:.1f} GB, whole process",
        "median",
        "least to most",
        "peak host memory",
        "x loratool --device cuda",
    ]
    return table(columns, rows)


def against_bandwidth() -> str:
    """The arithmetic of one matrix on the device, and the way there and back, as bytes moved each second."""
    import torch

    from loratool.merging.arithmetic import CUDA_BLOCK_BYTES

    rows, columns = CUDA_BLOCK_BYTES // 4 // 4096, 4096
    weight = torch.randn(rows, columns, device="cuda").bfloat16()
    a, b = torch.randn(16, columns, device="cuda"), torch.randn(rows, 16, device="cuda")
    block, other = torch.empty(rows, columns, device="cuda"), torch.empty_like(weight)
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)

    def arithmetic() -> None:
        block.copy_(weight)
        block.addmm_(b, a, alpha=2.0)
        weight.copy_(block)

    moved = weight.nbytes * 2 + block.nbytes * 4
    figures = [
        ("copy on the device", lambda: other.copy_(weight), 2 * weight.nbytes),
        ("decode, addmm, encode of a block", arithmetic, moved),
        ("host to device, pinned", lambda: weight.copy_(host, non_blocking=True), weight.nbytes),
        ("device to host, pinned", lambda: host.copy_(weight, non_blocking=True), weight.nbytes),
    ]
    lines = [[name, f"{nbytes / seconds(go) / 1e9:.0f} GB/s"] for name, go, nbytes in figures]
    return table([f"a block of {weight.nbytes / 1e6:.0f} MB of bf16", "bytes moved each second"], lines)


def seconds(go: object, repetitions: int = 50) -> float:
    """Seconds that one call takes on the device, over many in a row."""
    import torch

    assert callable(go)
    go()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repetitions):
        go()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000 / repetitions


if __name__ == "__main__":
    main()
