"""How long the commands that people type first take, and how fast a base is fingerprinted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from models import DATA, llama
from processes import in_turn, run, spread, wall
from results import holds, report, table

ROUNDS = int(os.environ.get("ROUNDS", "7"))
ADAPTERS = 1000


def main() -> None:
    base = llama()
    home = Path(tempfile.mkdtemp(dir=DATA))
    os.environ["LORATOOL_HOME"] = str(home)
    fill(home)
    loratool = [str(Path(sys.executable).with_name("loratool"))]
    clear = partial(shutil.rmtree, home / "digests", True)
    read = ["sh", "-c", f"cat {base}/*.safetensors > /dev/null"]
    runs = in_turn(
        {
            "python -c pass": (lambda: None, partial(run, [sys.executable, "-c", "pass"])),
            "--help": (lambda: None, partial(run, [*loratool, "--help"])),
            "list": (lambda: None, partial(run, [*loratool, "list"])),
            "list --json": (lambda: None, partial(run, [*loratool, "list", "--json"])),
            "cat": (lambda: None, partial(run, read)),
            "base add": (clear, partial(run, [*loratool, "base", "add", "llama", str(base)])),
        },
        ROUNDS,
    )
    rows = [[f"loratool {name}" if name.startswith(("-", "l")) else name, f"{wall(runs[name]):.2f} s", spread(runs[name]),
             "at most 0.35 s" if name in ("--help", "list") else "",
             holds(wall(runs[name]), most=0.35) if name in ("--help", "list") else ""]
            for name in ("python -c pass", "--help", "list", "list --json")]  # fmt: skip
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9
    rate = size / wall(runs["base add"])
    rows += [
        [f"cat of {size:.1f} GB to /dev/null", f"{wall(runs['cat']):.2f} s", spread(runs["cat"]), "", ""],
        ["loratool base add (fingerprint, nothing cached)", f"{wall(runs['base add']):.2f} s", spread(runs["base add"]),
         f"{rate:.1f} GB/s, at least 1", holds(rate, least=1)],
    ]  # fmt: skip
    torch = {words: imports_torch(words) for words in ("--help", "list")}
    body = table(["whole process", "median", "least to most", "target", ""], rows)
    body += f"\n\n{ADAPTERS} adapters in the catalogue. Torch is imported by: "
    body += (", ".join(words for words, found in torch.items() if found) or "neither `--help` nor `list`") + "."
    report("startup", "Start-up and fingerprints", body)
    shutil.rmtree(home)


def fill(home: Path) -> None:
    """Put so many adapters into the catalogue."""
    from registry import AdapterFacts, Registry

    with Registry.open(home) as registry, registry.writing():
        for number in range(ADAPTERS):
            facts = AdapterFacts(
                kind="lora", sha256=f"{number:064x}", size_bytes=9_000_000, rank=16, alpha=32.0, dtype="fp32",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], base_model="example/llama",
            )  # fmt: skip
            registry.adapters.add(f"adapter-{number}", facts, tags=["all", f"group-{number % 7}"])


def imports_torch(words: str) -> bool:
    code = f"import sys; sys.argv = ['loratool', {words!r}]\nfrom loratool.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode != 0


if __name__ == "__main__":
    main()
