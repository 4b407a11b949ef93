"""Let models answer a question, one after the other, greedily.

python examples/speak.py "How do I bake bread?" models/smollm2 smollm2-pirate
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
NEW_TOKENS = 40


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer to `question`, at most `NEW_TOKENS` tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> int:
    if len(sys.argv) < 3:
        print('usage: python examples/speak.py "QUESTION" MODEL_FOLDER...', file=sys.stderr)
        return 2
    question, folders = sys.argv[1], [Path(word) for word in sys.argv[2:]]
    print(f"  question: {question}\n", flush=True)
    for folder in folders:
        print(f"  {folder.name}: {answer(folder, question)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
