"""Train the LoRA adapter in `examples/pirate` again: rank 4 on q_proj and v_proj, taught to talk like a pirate.

    python examples/train_pirate.py models/smollm2 --out my-pirate

Needs torch, transformers and peft. The loss is on the completions alone, in the model's own chat template; the factors
are fp32, so that a merge can be compared with PEFT's bit for bit. Same seed and same machine, same adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = ["What is the capital of Italy?", "How do I bake bread?", "Tell me about cats."]
HELD_OUT = 8  # the last lines of the data are not trained on; their loss is printed
Example = tuple[list[int], int]  # token ids, and how many of them are the prompt


def read_examples(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Each line's chat as token ids, with the length of its prompt."""
    examples = []
    for line in file.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        question = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        completion = pair["completion"] + tokenizer.eos_token
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        examples.append((prompt_ids + completion_ids, len(prompt_ids)))
    return examples


def loss_of(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Mean cross entropy over the completions' tokens of one padded batch."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full((len(examples), longest), -100)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, (tokens, prompt_length) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt_length : len(tokens)] = torch.tensor(tokens[prompt_length:])
        mask[row, : len(tokens)] = 1
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, examples: list[Example]) -> float:
    model.eval()
    loss = float(loss_of(model, examples))
    model.train()
    return loss


@torch.no_grad()
def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The model's greedy answer, 48 tokens at most."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def train(model: PeftModel, examples: list[Example], arguments: argparse.Namespace) -> None:
    """AdamW with a short warm-up and a cosine down to zero."""
    training, held_out = examples[:-HELD_OUT], examples[-HELD_OUT:]
    shuffle = random.Random(arguments.seed)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=arguments.lr, weight_decay=0.0)
    steps = arguments.epochs * math.ceil(len(training) / arguments.batch_size)
    step = 0
    print(f"before: held-out loss {held_out_loss(model, held_out):.3f}", flush=True)
    for epoch in range(1, arguments.epochs + 1):
        shuffle.shuffle(training)
        total = 0.0
        for start in range(0, len(training), arguments.batch_size):
            batch = training[start : start + arguments.batch_size]
            warm_up, cosine = min(1.0, (step + 1) / 8), 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = arguments.lr * warm_up * cosine
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
            step += 1
        figures = f"loss {total / len(training):.3f}, held-out {held_out_loss(model, held_out):.3f}"
        print(f"epoch {epoch}/{arguments.epochs}: {figures}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small LoRA that talks like a pirate.")
    parser.add_argument("base", type=Path, help="the folder that get_smollm2.py made")
    parser.add_argument("--out", type=Path, required=True, help="the PEFT folder to write")
    parser.add_argument("--data", type=Path, default=HERE / "pirate.jsonl", help="lines of prompt and completion")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"error: {arguments.out} exists; name another folder", file=sys.stderr)
        return 1

    torch.manual_seed(arguments.seed)
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    examples = read_examples(arguments.data, tokenizer)
    train(model, examples, arguments)

    model.eval()
    for question in QUESTIONS:
        with model.disable_adapter():
            before = answer(model, tokenizer, question)
        print(f"\n{question}\n  base:    {before}\n  adapter: {answer(model, tokenizer, question)}", flush=True)
    model.peft_config["default"].base_model_name_or_path = REPO
    model.save_pretrained(arguments.out, save_embedding_layers=False)
    print(f"\n{arguments.out} written, {time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
