"""A model quantized to NF4, and merged into and quantized, against transformers and bitsandbytes, on a CPU."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from models import DATA, llama, lora
from processes import REST_SECONDS, Contestant, Run, in_turn, peak, run, spread, wall
from results import holds, report, table

ROUNDS = int(os.environ.get("ROUNDS", "5"))
LORATOOL = [sys.executable, "-m", "loratool"]
PEER = str(Path(__file__).with_name("bnb_quantize.py"))
PEER_AGAIN = "transformers + bitsandbytes, one thread"
MOST_MIB = 600
STATE = ".quant_state."
MERGE = "merge into the NF4 model"
AS_TRAINED = 0.15
"""At this weight the random adapter moves about 2% of the codes, as trained ones do: those of `nf4_merge.py` on all linear
layers 1.2 to 2.3%."""


def main() -> None:
    base, adapter = llama(), lora("all")
    os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(dir=DATA)
    names = ("quantize", "merge-quantize", "base-as", "merge-nf4", "merge-whole", "dequantize", "bnb", "bnb-one-thread")
    out = {name: DATA / f"out-{name}" for name in names}
    image = DATA / "llama-nf4"
    if not image.exists():
        run([*LORATOOL, "quantize", str(base), "--out", str(image)])

    def clear(name: str) -> None:
        shutil.rmtree(out[name], ignore_errors=True)

    def contestant(name: str, command: list[str]) -> Contestant:
        return partial(clear, name), partial(run, command)

    def merge(name: str, into: Path, *options: str, weight: float = 1) -> Contestant:
        words = ["merge", f"{adapter}={weight}", "--into", str(into), *options, "--out", str(out[name])]
        return contestant(name, [*LORATOOL, *words])

    contestants: dict[str, Contestant] = {
        "quantize": contestant("quantize", [*LORATOOL, "quantize", str(base), "--out", str(out["quantize"])]),
        MERGE: merge("merge-nf4", image, weight=AS_TRAINED),
        f"{MERGE}, an update of {1 / AS_TRAINED:.1f} times the size": merge("merge-whole", image),
        "merge --quantize nf4": merge("merge-quantize", base, "--quantize", "nf4"),
        "merge --base-as nf4": merge("base-as", base, "--base-as", "nf4"),
        "merge --dequantize": merge("dequantize", image, "--dequantize"),
    }
    weights = [*sorted(base.glob("*.safetensors")), *sorted(image.glob("*.safetensors"))]
    runs = in_turn(contestants, ROUNDS, weights)
    slow = in_turn({"bitsandbytes": contestant("bnb", [sys.executable, PEER, str(base), str(out["bnb"])])}, 2, weights)
    clear("bnb-one-thread")
    one_thread = run([sys.executable, PEER, str(base), str(out["bnb-one-thread"])], {"OMP_NUM_THREADS": "1"})
    differing = differences(out["quantize"], out["bnb-one-thread"])
    ratio = wall(slow["bitsandbytes"]) / wall(runs["quantize"])
    rows = [
        _row(f"loratool {name}", found, f"at most {MOST_MIB} MiB", holds(peak(found), most=MOST_MIB))
        for name, found in runs.items()
    ]
    merging = wall(runs[MERGE]) / wall(runs["quantize"])
    rows.append([MERGE, "", "", "", f"this / quantize = {merging:.2f}, at most 2", holds(merging, most=2)])
    target = f"this / loratool quantize = {ratio:.1f}, at least 3"
    rows.append(_row("transformers + bitsandbytes", slow["bitsandbytes"], target, holds(ratio, least=3)))
    rows.append(_row(PEER_AGAIN, [one_thread], "", ""))
    body = table(["whole process", "median", "least to most", "peak memory", "target", ""], rows)
    body += (
        f"\n\nTensors of `loratool quantize` that differ from those of bitsandbytes on one thread: {differing} (how it "
    )
    body += "rounds the mean of a matrix's scales depends on the number of its threads). "
    body += (
        f"{ROUNDS} rounds in turn after a warm-up, 2 of bitsandbytes, each after a rest of {REST_SECONDS:.0f} s; page "
    )
    body += "cache warm."
    report("quantize", "Quantizing: a 1.1 B-parameter bf16 Llama in five shards to NF4, double quantization", body)
    for folder in (*out.values(), Path(os.environ["LORATOOL_HOME"])):
        shutil.rmtree(folder, ignore_errors=True)


def _row(name: str, runs: list[Run], target: str, mark: str) -> list[str]:
    return [name, f"{wall(runs):.2f} s", spread(runs), f"{peak(runs):.0f} MiB", target, mark]


def differences(ours: Path, theirs: Path) -> int:
    """How many tensors differ in a bit, or are in one of the models alone; a quant_state counts as what it says."""
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                found |= dict.fromkeys(content.keys(), file)
        return found

    def value(file: Path, name: str) -> object:
        import torch

        with safe_open(file, "pt") as content:
            raw = content.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return json.loads(raw) if STATE in name else raw

    a, b = tensors(ours), tensors(theirs)
    return len(a.keys() ^ b.keys()) + sum(value(a[name], name) != value(b[name], name) for name in a.keys() & b.keys())


if __name__ == "__main__":
    main()
