"""A merge against `cp -r` and against PEFT, on a 1.1 B-parameter model; and one in place."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from models import DATA, llama, lora
from processes import REST_SECONDS, Contestant, in_turn, peak, run, spread, wall
from results import holds, report, table
from safetensors import safe_open

ROUNDS = int(os.environ.get("ROUNDS", "5"))
LORATOOL = [sys.executable, "-m", "loratool"]


def nothing() -> None:
    """What needs no preparation."""


def main() -> None:
    base, everything, qv = llama(), lora("all"), lora("qv")
    os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(dir=DATA)
    run([*LORATOOL, "base", "add", "llama", str(base)])
    out = {name: DATA / f"out-{name}" for name in ("cp", "loratool", "peft", "inplace")}

    def clear(name: str) -> None:
        shutil.rmtree(out[name], ignore_errors=True)

    def copy_for_in_place() -> None:
        clear("inplace")
        run(["cp", "-r", str(base), str(out["inplace"])])
        os.sync()
        run([*LORATOOL, "base", "add", "inplace", str(out["inplace"])])

    merge = [*LORATOOL, "merge", str(everything), "--into", "llama", "--out", str(out["loratool"])]
    in_place = [*LORATOOL, "merge", str(qv), "--into", str(out["inplace"]), "--in-place"]
    peft = [
        sys.executable,
        str(Path(__file__).with_name("peft_merge.py")),
        str(base),
        str(everything),
        str(out["peft"]),
    ]
    contestants: dict[str, Contestant] = {
        "import torch": (nothing, partial(run, [sys.executable, "-c", "import torch"])),
        "cp -r": (partial(clear, "cp"), partial(run, ["cp", "-r", str(base), str(out["cp"])])),
        "cp -r, sync": (
            partial(clear, "cp"),
            partial(run, ["sh", "-c", f"cp -r {base} {out['cp']} && sync -f {out['cp']}"]),
        ),
        "loratool": (partial(clear, "loratool"), partial(run, merge)),
        "loratool in place": (copy_for_in_place, partial(run, in_place)),
    }
    weights = sorted(base.glob("*.safetensors"))
    runs = in_turn(contestants, ROUNDS, weights)
    slow = in_turn({"PEFT": (partial(clear, "peft"), partial(run, peft))}, 2, weights)
    differing = differences(out["loratool"], out["peft"])
    run([*LORATOOL, "unmerge", str(out["inplace"]), "--in-place"])
    same = all((base / f.name).read_bytes() == f.read_bytes() for f in out["inplace"].iterdir())
    import_torch, cp, ours, theirs = (
        wall(r) for r in (runs["import torch"], runs["cp -r"], runs["loratool"], slow["PEFT"])
    )
    inside = wall(runs["loratool in place"])
    rows = [
        ["import torch", f"{import_torch:.2f} s", spread(runs["import torch"]), "", "", ""],
        ["cp -r of the base", f"{cp:.2f} s", spread(runs["cp -r"]), "", "", ""],
        [
            "cp -r of the base, made durable",
            f"{wall(runs['cp -r, sync']):.2f} s",
            spread(runs["cp -r, sync"]),
            "",
            "",
            "",
        ],
        [
            "loratool merge, all linear layers",
            f"{ours:.2f} s",
            spread(runs["loratool"]),
            f"{peak(runs['loratool']):.0f} MiB",
            f"(merge - import) / cp = {(ours - import_torch) / cp:.2f}, at most 1.5",
            holds((ours - import_torch) / cp, most=1.5),
        ],
        [
            "PEFT merge_and_unload + save_pretrained",
            f"{theirs:.1f} s",
            spread(slow["PEFT"]),
            f"{peak(slow['PEFT']):.0f} MiB",
            f"PEFT / loratool = {theirs / ours:.1f}, at least 6",
            holds(theirs / ours, least=6),
        ],
        [
            "loratool merge in place, q_proj and v_proj",
            f"{inside:.2f} s",
            spread(runs["loratool in place"]),
            f"{peak(runs['loratool in place']):.0f} MiB",
            f"(merge - import) / cp = {(inside - import_torch) / cp:.2f}, at most 0.3",
            holds((inside - import_torch) / cp, most=0.3),
        ],
    ]
    body = table(["whole process", "median", "least to most", "peak memory", "target", ""], rows)
    body += f"\n\nTensors of loratool's output that differ from PEFT's: {differing}. "
    body += f"The base after the merge in place and its unmerge: {'the same bytes' if same else '**other bytes**'}. "
    body += (
        f"{ROUNDS} rounds in turn after a warm-up, 2 of PEFT, each after a rest of {REST_SECONDS:.0f} s; page cache "
    )
    body += "warm; loratool's output is fsynced, cp's is not."
    report("speed", "Speed: a 1.1 B-parameter bf16 Llama in five shards, LoRA r=16", body)
    for folder in (*out.values(), Path(os.environ["LORATOOL_HOME"])):
        shutil.rmtree(folder, ignore_errors=True)


def differences(ours: Path, theirs: Path) -> int:
    """How many tensors differ in a bit, or are in one of the models alone."""
    import torch

    def tensors(folder: Path) -> dict[str, Path]:
        found = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                found |= dict.fromkeys(content.keys(), file)
        return found

    a, b = tensors(ours), tensors(theirs)
    differing = len(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        with safe_open(a[name], "pt") as left, safe_open(b[name], "pt") as right:
            bits = [content.get_tensor(name).view(torch.int16) for content in (left, right)]
            differing += not torch.equal(*bits)
    return differing


if __name__ == "__main__":
    main()
