"""What merges into 4 bits, and quantizing, take: whole processes, on 132 M parameters; beside another checkout of loratool.

    python benchmarks/quantized_speed.py [--against CHECKOUT] [--rounds N] [NAME]...

With `--against` the two run in turn, so that both meet the same machine: read the ratios, of processor time before those of wall
clock where others work on the machine too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from models import DATA
from processes import Contestant, Run, in_turn, median, peak, run, wall
from results import table

HERE = Path(__file__).resolve().parent.parent
SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(3)
    for module, shape in {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (256, 2048),
        "self_attn.v_proj": (256, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (5632, 2048),
        "mlp.up_proj": (5632, 2048),
        "mlp.down_proj": (2048, 5632),
    }.items()
}


def build(path: str) -> None:
    """A dense base and its 4-bit images, an adapter of rank 16, and a merge with an undo that can be taken out.

    It is called in a process of its own: one that is started counts the memory of the one that started it.
    """
    import recorded_inputs as inputs

    folder = Path(path)
    inputs.dense(folder / "bf16", "bf16", SHAPES)
    for kind in ("nf4", "fp4"):
        inputs.four_bit(folder / kind, kind, "bf16", SHAPES)
    inputs.lora(folder / "lora", SHAPES, rank=16)
    run([*loratool(HERE), "merge", str(folder / "lora"), "--into", str(folder / "nf4"), "--undo",
         "--out", str(folder / "merged")])  # fmt: skip
    (folder / "complete").touch()


def loratool(checkout: Path) -> list[str]:
    """The command as a checkout has it."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from loratool.cli import run; run()"
    return [sys.executable, "-c", code, str(checkout)]


def commands(data: Path, out: Path) -> Mapping[str, list[str]]:
    adapter, to = str(data / "lora"), ["--out", str(out)]
    merge = {
        name: ["merge", adapter, "--into", str(data / base), *more, *to]
        for name, (base, more) in {
            "nf4": ("nf4", []),
            "nf4-undo": ("nf4", ["--undo"]),
            "fp4-undo": ("fp4", ["--undo"]),
            "quantize": ("bf16", ["--quantize", "nf4"]),
            "base-as": ("bf16", ["--base-as", "nf4"]),
            "dequantize": ("nf4", ["--dequantize"]),
            "dense-undo": ("bf16", ["--undo"]),
        }.items()
    }
    return merge | {
        "unmerge": ["unmerge", str(data / "merged"), *to],
        "quantization": ["quantize", str(data / "bf16"), *to],
    }


def shown(name: str, before: list[Run] | None, after: list[Run]) -> list[str]:
    cpu = median([each.cpu for each in after])
    row = [name, f"{wall(after):.2f} s", f"{cpu:.2f} s", f"{peak(after):.0f} MiB"]
    if before:
        row += [f"{wall(after) / wall(before):.3f}", f"{cpu / median([each.cpu for each in before]):.3f}",
                f"{peak(before):.0f} MiB"]  # fmt: skip
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    data, home = DATA / "quantized-speed", Path(tempfile.mkdtemp())
    os.environ["LORATOOL_HOME"] = str(home)
    if not (data / "complete").exists():
        shutil.rmtree(data, ignore_errors=True)
        code = f"import quantized_speed; quantized_speed.build({str(data)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    out = data / "out"
    checkouts = {"": HERE} | ({"before": arguments.against.resolve()} if arguments.against else {})
    contestants: dict[str, Contestant] = {}
    for name, words in commands(data, out).items():
        for label, checkout in checkouts.items():
            if not arguments.names or name in arguments.names:
                clear = partial(shutil.rmtree, out, ignore_errors=True)
                contestants[f"{name} {label}".strip()] = clear, partial(run, [*loratool(checkout), *words])
    runs = in_turn(contestants, arguments.rounds)
    columns = ["", "wall", "processor", "memory"]
    columns += ["wall / before", "processor / before", "memory before"] if arguments.against else []
    names = [name for name in runs if not name.endswith(" before")]
    print(table(columns, [shown(name, runs.get(f"{name} before"), runs[name]) for name in names]))
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
