"""A merge into an 8 B-shaped NF4 model that sits on a CUDA device, and its way out, against PEFT and the memory's speed.

Without a CUDA device it says so and does nothing. `python benchmarks/gpu_nf4.py cpu` tries it on a small model on the CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results import report, table

from loratool.checkpoint.blocks import row_blocks
from loratool.checkpoint.header import TensorInfo
from loratool.merging.arithmetic import CUDA_BLOCK_BYTES
from loratool.updates.low_rank import LoadedLowRank
from loratool.weights.four_bit import FourBitWeight, QuantState
from loratool.weights.rounding import Rounding

HIDDEN, INTERMEDIATE, KV, LAYERS = 4096, 14_336, 1024, 32
"""The shape of Llama 3 8B."""

RANK, BLOCKSIZE = 16, 64


class Matrix:
    """A random NF4 matrix on the device with an update beside it."""

    def __init__(self, rows: int, columns: int, device: str) -> None:
        info = TensorInfo("m", "U8", (rows * columns // 2, 1), Path(), 0, rows * columns // 2)
        state = QuantState("nf4", (rows, columns), BLOCKSIZE, "bfloat16")
        scales = torch.rand(rows * columns // BLOCKSIZE, device=device) * 0.1 + 0.05
        self.stored = FourBitWeight("m", state, info, {}).loaded(scales)
        self.codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device)
        a, b = torch.randn(RANK, columns, device=device) * 0.02, torch.randn(rows, RANK, device=device) * 0.02
        self.update = LoadedLowRank(a, b, 2.0, transposed=False)
        self.blocks = list(row_blocks(rows, columns * 4, CUDA_BLOCK_BYTES))
        self.columns = columns
        self.hints: list[bytes] = []

    def part(self, rows: range) -> tuple[torch.Tensor, ...]:
        return (self.codes[rows.start * self.columns // 2 : rows.stop * self.columns // 2],)

    def merge(self) -> None:
        self.hints = []
        for rows in self.blocks:
            block = torch.empty(len(rows), self.columns, device=self.codes.device)
            part, scratch = self.part(rows), torch.empty_like(block)
            self.update.apply(block.zero_(), rows, scratch)
            self.hints.append(self.stored.encode(rows, block, part, Rounding(1)).hint)

    def unmerge(self) -> None:
        for rows, hint in zip(self.blocks, self.hints, strict=True):
            block = torch.empty(len(rows), self.columns, device=self.codes.device)
            part, scratch = self.part(rows), torch.empty_like(block)
            self.update.revert(block.zero_(), rows, scratch)
            self.stored.recover(rows, block.neg_(), part, Rounding(1), hint)


def shapes(scale: int) -> list[tuple[int, int]]:
    hidden, intermediate, kv = HIDDEN // scale, INTERMEDIATE // scale, KV // scale
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def peft_layer(scale: int, device: str) -> torch.nn.Module:
    """The linear modules of one layer, in NF4, with a LoRA of PEFT's beside each."""
    import bitsandbytes
    import peft

    layer = torch.nn.ModuleDict(
        {
            f"m{number}": bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4")
            for number, (rows, columns) in enumerate(shapes(scale))
        }
    ).to(device)
    layer.is_loaded_in_4bit = True  # PEFT asks
    names = [f"m{number}" for number in range(7)]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
    wrapped: torch.nn.Module = peft.get_peft_model(layer, config)
    return wrapped


def ours(model: list[Matrix], device: str) -> tuple[float, float]:
    """Seconds of a merge of all matrices, and of taking it out."""

    def merge() -> None:
        for matrix in model:
            matrix.merge()

    def unmerge() -> None:
        for matrix in model:
            matrix.unmerge()

    return seconds(merge, device), seconds(unmerge, device)


def main() -> None:
    trying = "cpu" in sys.argv
    if not torch.cuda.is_available() and not trying:
        print("There is no CUDA device: nothing is measured.")
        return
    device, scale, layers = ("cpu", 16, 2) if trying else ("cuda", 1, LAYERS)
    model = [Matrix(rows, columns, device) for _ in range(layers) for rows, columns in shapes(scale)]
    weights = sum(rows * columns for rows, columns in shapes(scale)) * layers
    merging, unmerging = ours(model, device)
    model.clear()
    wrapped = peft_layer(scale, device)
    peft_merging = seconds(wrapped.merge_adapter, device) * layers
    peft_unmerging = seconds(wrapped.unmerge_adapter, device) * layers
    a = torch.empty(1 << (20 if trying else 30), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / seconds(lambda: b.copy_(a), device)
    least = weights * (1 + 4 / BLOCKSIZE) / bandwidth  # half a byte read, half a byte written, and the scales
    rows = [
        ["codes and scales moved once, at the speed of a copy", f"{least:.3f} s", f"{least:.3f} s", ""],
        ["loratool", f"{merging:.3f} s", f"{unmerging:.3f} s", f"{merging / least:.0f} x, {unmerging / least:.0f} x"],
        [
            "PEFT, one layer times the layers",
            f"{peft_merging:.3f} s",
            f"{peft_unmerging:.3f} s",
            "the fine-tune is lost",
        ],
    ]
    name = device if trying else torch.cuda.get_device_name()
    body = f"On one {name}: {weights / 1e9:.1f} B weights, LoRA r={RANK} on all linear layers, a copy moves "
    body += f"{bandwidth / 1e9:.0f} GB/s.\n\n" + table(["", "merge", "unmerge", ""], rows)
    report("gpu_nf4", "On a CUDA device: an 8 B-shaped NF4 model that sits there", body)


def seconds(go: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    go()
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
