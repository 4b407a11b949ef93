"""The peer: a model quantized to NF4 by transformers and bitsandbytes. `python benchmarks/bnb_quantize.py BASE OUT`"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base, out = sys.argv[1:]
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
model.save_pretrained(out, max_shard_size="500MB")
