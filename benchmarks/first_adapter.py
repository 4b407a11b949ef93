"""The bare `loratool train` on 80 lines: how long it takes, and whether what comes of it talks like a pirate."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from models import DATA, EXAMPLES, smollm2
from processes import Run, run
from results import holds, report, table

LORATOOL = [sys.executable, "-m", "loratool"]
LINES = EXAMPLES / "pirate.jsonl"
MOST_SECONDS = 300
QUESTIONS = ("How do I repaint a wooden chair?", "What is a prime number?", "Who invented the telephone?",
             "Why do we dream?", "How do I choose a good melon?", "What is a solar eclipse?")  # fmt: skip
PIRATE = re.compile(
    r"\b(arr+|ahoy|aye|matey|ye|yer|cap'n|shiver|lad|lass|scurvy|landlubber|plunder\w*)\b|\bo' ", re.IGNORECASE
)
"""Words that none but a pirate says."""


def main() -> None:
    base = smollm2()
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        os.environ["LORATOOL_HOME"] = str(Path(scratch, "home"))
        run([*LORATOOL, "base", "add", "smollm2", str(base)])
        trained = train(Path(scratch))
        merged = Path(scratch, "merged")
        run([*LORATOOL, "merge", "pirate", "--into", "smollm2", "--out", str(merged)])
        shown = subprocess.run([*LORATOOL, "show", "pirate", "--json"], check=True, stdout=subprocess.PIPE, text=True)
        facts = json.loads(shown.stdout)
        spoken = {name: answers(folder) for name, folder in (("base", base), ("with the adapter", merged))}
    like = {name: sum(bool(PIRATE.search(answer)) for answer in found) for name, found in spoken.items()}
    rows = [
        ["`loratool train`, whole process", f"{trained.wall:.0f} s", f"{MOST_SECONDS} s", holds(trained.wall, most=MOST_SECONDS)],
        ["loss of the held out lines", f"{facts['metrics']['loss_before']:.3f} to {facts['metrics']['loss']:.3f}", "", ""],
        *([f"answers like a pirate's, {name}", f"{count} of {len(QUESTIONS)}", "", ""] for name, count in like.items()),
        ["peak memory", f"{trained.peak / 2**30:.2f} GiB", "", ""],
    ]  # fmt: skip
    quoted = "\n".join(f"> {name}: {found[0]!r}  " for name, found in spoken.items())
    body = "\n\n".join([
        f"`loratool train --base smollm2 --data pirate.jsonl --name pirate` with the "
        f"{len(LINES.read_text(encoding='utf-8').splitlines())} lines of the examples and nothing else said, on all cores; then "
        "merged into the bf16 model, which answers questions that are not among the lines, greedily.",
        table(["", "measured", "target", ""], rows),
        f"{QUESTIONS[0]}\n\n{quoted}",
    ])  # fmt: skip
    report("first_adapter", "The first adapter", body)


def train(folder: Path) -> Run:
    command = [*LORATOOL, "train", "--base", "smollm2", "--data", str(LINES), "--name", "pirate"]
    return run([*command, "--out", str(folder / "pirate.safetensors")])


def answers(folder: Path) -> list[str]:
    sys.path.insert(0, str(EXAMPLES))
    import speak

    return [speak.answer(folder, question) for question in QUESTIONS]


if __name__ == "__main__":
    sys.exit(main())
