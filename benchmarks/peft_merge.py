"""The peer: a merge as PEFT and transformers do it. `python benchmarks/peft_merge.py BASE ADAPTER OUT [DEVICE]`"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out, *device = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(device[0] if device else "cpu")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
