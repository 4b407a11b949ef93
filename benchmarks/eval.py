"""The loss that `loratool eval` gives each method's adapter against the loss that the same adapter has in PEFT."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from models import DATA, smollm2
from results import holds, report, table
from torch.nn.functional import cross_entropy
from trained import HELD_OUT, TEXTS

import loratool
from loratool.running.data import IGNORED, read_data, tokenize_data
from loratool.running.model import load_config, load_model, load_tokenizer, quiet_libraries

STYLES = os.environ.get("STYLES", "legal,terse").split(",")
STEPS = int(os.environ.get("STEPS", "16"))
RANK, CUT = 8, 3
MAX_LENGTH = 512
NF4 = DATA / "smollm2-nf4"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "lora", "quantize": "nf4"},
    "DyLoRA": {"method": "dylora"},
    "AdaLoRA": {"method": "adalora"},
}


def main() -> None:
    dense = smollm2()
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        os.environ["LORATOOL_HOME"] = str(Path(scratch, "home"))
        loratool.base_add("smollm2", dense)
        if not NF4.exists():
            loratool.quantize("smollm2", out=NF4)
        rows = [row for style in STYLES for row in compare(style, dense, Path(scratch))]
    columns = ["style", "method", "loaded in PEFT as", "loss without", "`loratool eval`", "PEFT", "apart (target 1e-3)"]
    body = "\n\n".join([
        f"SmolLM2-135M, trained for {STEPS} steps at rank {RANK} on all linear layers by `loratool train`; {HELD_OUT} samples "
        f"that it did not see. A DyLoRA is cut to rank {CUT} by `loratool truncate` and then a LoRA of PEFT's. The NF4 model "
        "computes in fp32 on both sides, where transformers by itself would compute in bf16.",
        table(columns, rows),
    ])  # fmt: skip
    report("eval", "Each method's loss in PEFT", body)


def compare(style: str, dense: Path, folder: Path) -> list[list[str]]:
    """A row for each method, of adapters trained on the first lines of a style and scored on its last ones."""
    lines = (TEXTS / f"{style}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    seen, unseen = folder / f"{style}.jsonl", folder / f"{style}-unseen.jsonl"
    seen.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    unseen.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    rows = []
    for method, choices in METHODS.items():
        name = f"{style}-{method}".lower()
        adapter = folder / name
        loratool.train("smollm2", seen, name=name, out=adapter, rank=RANK, steps=STEPS, device="cpu", **choices)
        if method == "DyLoRA":
            adapter = folder / f"{name}-cut"
            loratool.truncate(name, rank=CUT, out=adapter)
        model = NF4 if method == "QLoRA" else dense
        ours = loratool.eval(model, unseen, adapter=adapter, max_length=MAX_LENGTH, device="cpu")
        theirs, kind = in_peft(model, adapter, unseen)
        assert ours.without_adapter is not None
        apart = abs(ours.score.loss - theirs) / theirs
        print(f"{style} {method}: {ours.score.loss:.6f}, PEFT {theirs:.6f}", flush=True)
        rows.append([style, method, kind, f"{ours.without_adapter.loss:.4f}", f"{ours.score.loss:.4f}",
                     f"{theirs:.4f}", f"{apart:.1e}: {holds(apart, most=1e-3)}"])  # fmt: skip
    return rows


def in_peft(base: Path, adapter: Path, data: Path) -> tuple[float, str]:
    """The mean loss of a scored token, one sample at a time, and the type that PEFT says the adapter has."""
    with quiet_libraries():
        # An NF4 model computes in fp32 here, as it does in `loratool eval`; transformers would load it to compute in bf16.
        model = load_model(base, load_config(base), "cpu")
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    samples = tokenize_data(read_data(data), load_tokenizer(base), MAX_LENGTH)
    summed = tokens = 0.0
    for sample in samples:
        with torch.no_grad():  # without labels: PEFT's AdaLoRA wants to train where it is given some
            logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0, :-1]
        labels = torch.tensor(sample.labels[1:])
        summed += float(cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum"))
        tokens += sample.scored_tokens
    return summed / tokens, str(model.active_peft_config.peft_type.value)


if __name__ == "__main__":
    sys.exit(main())
