"""The trained adapters that NF4 merges are measured with, trained once under `.data/` (not in version control).

    python benchmarks/trained.py [NAME]...

`pirate` comes with the examples. The others are trained as that one was (`examples/train_pirate.py`), on the small files in
`texts/`: another style, rank and choice of modules each. The last lines of every file are kept from training.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from models import DATA, EXAMPLES, TARGETS, smollm2

TEXTS = Path(__file__).parent / "texts"
HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter was trained: its lines of prompt and completion, rank, alpha, modules, epochs and learning rate."""

    data: Path
    rank: int
    alpha: float
    targets: tuple[str, ...]
    epochs: int
    lr: float

    def describe(self) -> str:
        return f"r={self.rank}, {'all linear' if len(self.targets) == 7 else ', '.join(self.targets)}"


ALL = tuple(TARGETS["all"])
PIRATE = EXAMPLES / "pirate.jsonl"
RECIPES = {
    "pirate": Recipe(PIRATE, 4, 16, ("q_proj", "v_proj"), 6, 2e-3),
    "legal": Recipe(TEXTS / "legal.jsonl", 16, 32, ALL, 4, 5e-4),
    "terse": Recipe(TEXTS / "terse.jsonl", 32, 32, ("q_proj", "k_proj", "v_proj", "o_proj"), 5, 1e-3),
    "pirate-all": Recipe(PIRATE, 8, 16, ALL, 4, 1e-3),
    "terse-mlp": Recipe(TEXTS / "terse.jsonl", 2, 8, ("gate_proj", "up_proj", "down_proj"), 5, 1e-3),
}


def adapter(name: str) -> Path:
    """The PEFT folder of one of the `RECIPES`, trained if it is not there yet."""
    folder = EXAMPLES / name if name == "pirate" else DATA / f"adapter-{name}"
    if not (folder / "adapter_config.json").exists():
        _train(RECIPES[name], folder)
    return folder


def split(name: str) -> tuple[list[str], list[str]]:
    """The lines of JSON that an adapter was trained on, and those kept from it."""
    lines = RECIPES[name].data.read_text(encoding="utf-8").splitlines()
    return lines[:-HELD_OUT], lines[-HELD_OUT:]


def _train(recipe: Recipe, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(EXAMPLES))
    import train_pirate

    torch.manual_seed(0)
    base = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets), task_type="CAUSAL_LM"),
    )
    arguments = argparse.Namespace(seed=0, epochs=recipe.epochs, batch_size=8, lr=recipe.lr)
    train_pirate.train(model, train_pirate.read_examples(recipe.data, tokenizer), arguments)
    model.save_pretrained(folder, save_embedding_layers=False)


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        print(name, flush=True)
        adapter(name)
