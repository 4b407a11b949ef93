"""The most memory that a few training steps of a small Llama really take, a line of JSON each: run as a process of its own.

What is measured is the growth of the process's resident memory over what it was before the model was made.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, RANK, STEPS = 4, 256, 8, 2


def resident(key: str) -> int:
    """Bytes: ``VmRSS`` is what the process has, ``VmHWM`` the most since it was last reset."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def growth(*, full: bool, checkpointing: bool) -> int:
    """Of resident memory at its peak."""
    small = {"hidden_size": 48, "intermediate_size": 64, "vocab_size": 64}
    run_steps(CONFIG | small, full=full, checkpointing=checkpointing)  # loads the code of every operation
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run_steps(CONFIG, full=full, checkpointing=checkpointing)
    return resident("VmHWM") - before


def run_steps(config: dict[str, Any], *, full: bool, checkpointing: bool) -> None:
    """Make a model and train it."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).train()
    if not full:
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", lora_dropout=0.0))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    input_ids = torch.randint(0, config["vocab_size"], (ROWS, LENGTH))
    mask = torch.ones_like(input_ids)
    mask[0, 200:] = 0
    for _ in range(STEPS):
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten())
        del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def measure(*, full: bool, checkpointing: bool) -> None:
    """Print one case, from a child, in which nothing is left of the one before."""
    child = os.fork()
    if child == 0:
        peak = growth(full=full, checkpointing=checkpointing)
        print(json.dumps({"full": full, "checkpointing": checkpointing, "peak": peak}), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    for full in (True, False):
        for checkpointing in (False, True):
            measure(full=full, checkpointing=checkpointing)
