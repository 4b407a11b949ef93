"""Every command that writes, and what it is run on when a signal strikes it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Case:
    """A command, and the commands that were run before it.

    ``{turn}`` in `words` is another word for each try: what is on the Hub stays there.
    """

    words: str
    before: tuple[str, ...] = ()
    needs: str = ""
    """A file of the state before the run; the last of `before` is struck until it is there."""

    def of(self, turn: str) -> str:
        """Return the words of one try."""
        return self.words.format(turn=turn)


TRAIN = (
    "train --base base --data cats.jsonl --name cat --out cat.st --steps 6 --save-every 1 --validation 4 --device cpu"
)
ADD = "add adapter --name pirate"
CASES = {
    "merge": Case("merge adapter --into base --out merged --undo"),
    "merge over": Case("merge adapter --into base --out merged --force", ("merge other --into base --out merged",)),
    "merge nf4": Case("merge adapter --into base --out merged --quantize nf4"),
    "merge in place": Case("merge adapter --into base --in-place"),
    "unmerge": Case("unmerge merged --out restored", ("merge adapter --into base --out merged --undo",)),
    "unmerge in place": Case("unmerge base --in-place", ("merge adapter --into base --in-place",)),
    "quantize": Case("quantize base --out base-nf4 --name llama-nf4", ("base add llama base",)),
    "train": Case(TRAIN),
    "train resume": Case("train --name cat --resume", (TRAIN,), needs="home/runs/cat/state.safetensors"),
    "add": Case("add adapter --name pirate --base llama", ("base add llama base",)),
    "pull": Case("pull ada/pirate", ("base add llama base",)),
    "truncate": Case("truncate adapter --rank 1,2 --out cut.st", ("base add llama base", "add adapter --base llama")),
    "combine": Case("combine adapter other --method svd --rank 3 --out mix.st"),
    "extract": Case("extract tuned --base base --rank 2 --out difference", ("merge other --into base --out tuned",)),
    "prune": Case("prune adalora --average-rank 1 --out pruned.st"),
    "export": Case("export pirate --out exported", (ADD,)),
    "base add": Case("base add llama base"),
    "base remove": Case("base remove llama", ("base add llama base",)),
    "dequantize": Case("merge adapter --into base-nf4 --dequantize --out merged", ("quantize base --out base-nf4",)),
    "unmerge by base": Case(
        "unmerge merged --out restored", ("base add llama base", "merge adapter --into base --out merged")
    ),
    "tag": Case("tag pirate speech demo", (ADD,)),
    "remove": Case("remove pirate", (ADD,)),
    "remove now": Case("remove pirate --now", (ADD,)),
    "restore": Case("restore pirate@1", (ADD, "remove pirate")),
    "doctor gc": Case("doctor --gc --trash-days 0", (ADD, "remove pirate")),
    "push": Case("push pirate ada/pirate-{turn} --yes --base-model ada/base", (ADD,)),
}
ONLINE = {"pull", "push"}
"""The commands that speak to the Hub."""


def build(folder: Path) -> None:
    """Make what the commands work on: a base with a tokenizer, two LoRAs, an AdaLoRA and samples."""
    from test_eval import CHATML, tiny_tokenizer, with_tokenizer, write_lines
    from tiny_adapters import TinyAdapters, save_peft_adalora
    from tiny_models import TinyModels, load

    models = TinyModels(folder.parent / "models")
    adapters = TinyAdapters(folder.parent / "adapters", models)
    folder.mkdir(parents=True)
    plain = models.folder("llama", "bf16", "sharded")
    with_tokenizer(plain, folder / "base", tiny_tokenizer(template=CHATML))
    shutil.copytree(adapters.folder("llama"), folder / "adapter")
    shutil.copytree(adapters.folder("llama", seed=2), folder / "other")
    save_peft_adalora(load(plain, "llama"), folder / "adalora")
    samples = [{"prompt": f"{'what ' * (n % 5)}sat", "completion": f"{'a cat ' * (n % 3)}dog"} for n in range(24)]
    write_lines(folder / "cats.jsonl", *samples)
