"""bf16 and fp16 adapters: loratool and PEFT against the fp32 computation rounded once, on SmolLM2."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp()

import torch
from models import DATA, EXAMPLES, smollm2
from peft import PeftModel
from results import report, table
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loratool

SCALING = 4.0


def main() -> None:
    base, rows = smollm2(), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        adapter = adapter_as(dtype)
        expected = expected_weights(base, adapter)
        out = DATA / "numerics-out"
        loratool.merge([adapter], into=base, out=out)
        ours = load_file(out / "model.safetensors")
        shutil.rmtree(out)
        row = [str(dtype).removeprefix("torch."), differing(ours, expected)]
        for autocast in (True, False):
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            peft = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=autocast)
            row.append(differing(peft.merge_and_unload().state_dict(), expected))
        rows.append(row)
        shutil.rmtree(adapter)
    columns = ["factors stored as", "loratool", "PEFT", "PEFT, autocast_adapter_dtype=False"]
    body = "Elements of the 60 merged weights that differ from W + scaling B A in fp32, rounded once to bf16:\n\n"
    report("numerics", "Numerics: factors that are not fp32", body + table(columns, rows))


def adapter_as(dtype: torch.dtype) -> Path:
    folder = DATA / f"pirate-{str(dtype).removeprefix('torch.')}"
    shutil.copytree(EXAMPLES / "pirate", folder, dirs_exist_ok=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def expected_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    factors, weights = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    expected = {}
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            b = factors[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            expected[weight] = (weights[weight].float() + b.float() @ a.float() * SCALING).bfloat16()
    return expected


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    wrong = sum(int((found[name] != weight).sum()) for name, weight in expected.items())
    return f"{wrong} ({wrong / sum(weight.numel() for weight in expected.values()):.3%})"


if __name__ == "__main__":
    main()
    shutil.rmtree(os.environ["LORATOOL_HOME"], ignore_errors=True)
