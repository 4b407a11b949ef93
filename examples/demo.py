"""The main jobs on a real model, as one show: train an adapter, cut it, merge it, hear it, check it, take it out again.

    make demo

Everything goes into the folder .demo beside this project; your own catalogue is not touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / ".demo"
MODEL, MERGED, RESTORED = STAGE / "smollm2", STAGE / "smollm2-pirate", STAGE / "smollm2-again"
ADAPTER, SMALLER = STAGE / "pirate.safetensors", STAGE / "pirate-r4.safetensors"
QUESTION = "How do I bake bread?"
BOLD, DIM, GREEN, CYAN, PLAIN = (
    ("\033[1m", "\033[2m", "\033[32m", "\033[36m", "\033[0m") if sys.stdout.isatty() else ("",) * 5
)


def main() -> int:
    started = time.monotonic()
    STAGE.mkdir(exist_ok=True)
    for folder in (STAGE / "home", MERGED, RESTORED):
        shutil.rmtree(folder, ignore_errors=True)
    for file in STAGE.glob("pirate*"):
        file.unlink()
    os.environ["LORATOOL_HOME"] = str(STAGE / "home")

    title("A base model")
    run([sys.executable, "examples/get_smollm2.py", str(MODEL)])
    loratool("base", "add", "smollm2", str(MODEL))
    title("An adapter for it, trained on 80 lines: a DyLoRA, usable at every rank")
    loratool(
        *("train", "--base", "smollm2", "--data", "examples/pirate.jsonl", "--name", "pirate"),
        *("--method", "dylora", "--rank", "8", "--out", str(ADAPTER)),
    )
    loratool("list")
    loratool("show", "pirate")
    title("A smaller one: its first four components")
    loratool("truncate", "pirate", "--rank", "4", "--out", str(SMALLER))
    title("What a merge would do, and the merge")
    loratool("merge", "pirate-r4", "--dry-run", "--out", str(MERGED))
    loratool("merge", "pirate-r4", "--undo", "--out", str(MERGED))
    title("Base and merged model answer")
    run([sys.executable, "examples/speak.py", QUESTION, str(MODEL), str(MERGED)])
    title("Checked, and taken out again: the undo file alone is enough")
    loratool("verify", str(MERGED))
    loratool("unmerge", str(MERGED), "--out", str(RESTORED))
    same = prove_equal(MODEL, RESTORED)
    print(f"\n{DIM}{time.monotonic() - started:.0f} s in all; everything is in {STAGE.name}/{PLAIN}")
    print(f"\nTo use loratool yourself, type:  {how_to_find_loratool()}")
    return 0 if same else 1


def how_to_find_loratool() -> str:
    """The line that makes the command ``loratool`` found in this shell."""
    activate = Path(sys.executable).parent / "activate"
    here = os.path.relpath(activate, Path.cwd())
    return f". {here if not here.startswith('..') else activate}"


def title(text: str) -> None:
    print(f"\n{BOLD}== {text}{PLAIN}", flush=True)


def loratool(*words: str) -> None:
    """Run a command of loratool as a user types it."""
    typed = " ".join(["loratool", *(os.path.relpath(word, ROOT) if word.startswith("/") else word for word in words)])
    print(f"\n{CYAN}$ {typed}{PLAIN}", flush=True)
    run([sys.executable, "-m", "loratool", *words])


def run(command: list[str]) -> None:
    """Run a command, its output as it comes; end the show where it fails."""
    finished = subprocess.run(command, cwd=ROOT, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def prove_equal(base: Path, restored: Path) -> bool:
    """Print the sha256 of the weights on both sides and say whether every file is equal."""
    print()
    for folder in (base, restored):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        print(f"{digest[:32]}…  {folder.relative_to(ROOT)}/model.safetensors")
    names = sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file() and ".cache" not in path.parts)
    others = sorted(path.relative_to(restored) for path in restored.rglob("*") if path.is_file())
    same = names == others and all((base / name).read_bytes() == (restored / name).read_bytes() for name in names)
    print(f"{GREEN}All {len(names)} files are equal, byte for byte.{PLAIN}" if same else "The files DIFFER.")
    return same


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the command that ran has said so
        sys.exit(130)
