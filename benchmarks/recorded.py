"""The bytes of recorded merges: made again, and compared with those of another version.

    python benchmarks/recorded.py --save before.json
    python benchmarks/recorded.py --compare before.json [NAME]...

Every byte of a merge's output counts: weights, undo files, adapters beside them, configuration. Of the manifest each entry
counts by itself, but for paths and the versions of programs. A merge with an undo is also taken out again, and must give its
base. Exit status 1 where anything differs. Compare on one machine: another BLAS may sum a product in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["LORATOOL_HOME"] = tempfile.mkdtemp(prefix="recorded-home-")

import recorded_inputs as inputs
import torch

import loratool

MANIFEST = "loratool.json"

Digests = dict[str, str]


@dataclass(frozen=True, slots=True)
class Merge:
    """Adapters, by name and maybe with a weight, merged into a model with these options."""

    model: str
    adapters: tuple[str | tuple[str, float], ...]
    options: Mapping[str, Any] = field(default_factory=dict)


UNDO = {"undo": True}
MERGES: Mapping[str, Merge | tuple[str, Mapping[str, Any]]] = {
    "dense-bf16": Merge("bf16", ("lora",), UNDO),
    "dense-fp16": Merge("fp16", ("lora",), UNDO),
    "dense-fp32": Merge("fp32", ("rslora",), UNDO),
    "dense-ragged": Merge("bf16-ragged", ("ragged",), UNDO),
    "dense-in-place": Merge("bf16", ("lora",), {"in_place": True}),
    "dense-several": Merge("bf16", (("lora", 0.7), ("rslora", -0.4), "adalora"), UNDO),
    "dense-adalora": Merge("fp32", ("adalora",), UNDO),
    "dense-dylora": Merge("bf16", ("dylora@rank=3",), UNDO),
    "dense-kohya": Merge("bf16", ("kohya",), UNDO),
    "dense-head": Merge("fp16", ("head",), UNDO),
    "dense-conv1d": Merge("gpt2", ("gpt2",), UNDO),
    "nf4": Merge("nf4", ("lora",), UNDO),
    "nf4-plain": Merge("nf4-plain", ("lora",), UNDO),
    "nf4-ragged": Merge("nf4-ragged", ("ragged",), UNDO),
    "nf4-strong": Merge("nf4", ("strong",), UNDO),
    "nf4-in-place": Merge("nf4", ("lora",), {"in_place": True}),
    "nf4-several": Merge("nf4", (("lora", 0.7), ("rslora", -0.4), "adalora"), UNDO),
    "nf4-adalora": Merge("nf4", ("adalora",), UNDO),
    "nf4-dylora": Merge("nf4", ("dylora@rank=3",), UNDO),
    "nf4-kohya": Merge("nf4", ("kohya",), UNDO),
    "nf4-head": Merge("nf4", ("head",), UNDO),
    "nf4-calibrated": Merge("nf4", ("lora",), {"calibrate": "text"}),
    "nf4-calibrated-strong": Merge("nf4-plain", ("strong",), {"calibrate": "text"}),
    "fp4": Merge("fp4", ("lora",), UNDO),
    "fp4-plain": Merge("fp4-plain", ("lora",), UNDO),
    "fp4-ragged": Merge("fp4-ragged", ("ragged",), UNDO),
    "fp4-strong": Merge("fp4", ("strong",), UNDO),
    "fp4-calibrated": Merge("fp4", ("lora",), {"calibrate": "text"}),
    "quantize": Merge("bf16", ("lora",), {"quantize": "nf4"}),
    "quantize-ragged": Merge("bf16-ragged", ("ragged",), {"quantize": "nf4"}),
    "quantize-replaced": Merge("bf16", ("replaced",), {"quantize": "nf4"}),
    "quantize-conv1d": Merge("gpt2", ("gpt2",), {"quantize": "nf4"}),
    "base-as": Merge("bf16", ("lora",), {"base_as": "nf4"}),
    "base-as-ragged": Merge("bf16-ragged", ("ragged",), {"base_as": "nf4"}),
    "base-as-conv1d": Merge("gpt2", ("gpt2",), {"base_as": "nf4"}),
    "dequantize-nf4": Merge("nf4", ("lora",), {"dequantize": True}),
    "dequantize-fp4": Merge("fp4-ragged", ("ragged",), {"dequantize": True}),
    "quantization": ("bf16", {}),
    "quantization-plain": ("fp32", {"blocksize": 128, "double_quant": False}),
    "quantization-ragged": ("bf16-ragged", {}),
    "quantization-conv1d": ("gpt2", {}),
}
"""Merges, and quantizations: a model and the options of `loratool.quantize`."""


class Inputs:
    """The models and adapters, built in `root` when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.text = inputs.text(root / "text.jsonl")

    def model(self, name: str) -> Path:
        folder = self._root / "models" / name
        return folder if folder.exists() else inputs.MODELS[name](folder)

    def adapter(self, name: str) -> str:
        own, at, rank = name.partition("@")
        made = self._root / "adapters" / f"{own}.made"
        if not made.exists():
            built = inputs.ADAPTERS[own](self._root / "adapters" / own)
            made.write_text(str(built))
        return made.read_text() + at + rank


def digests(folder: Path) -> Digests:
    """SHA-256 of every file, by its path in the folder; of the manifest of each entry that says what was done."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name == MANIFEST:
            found |= {f"{name}: {key}": sha256(text.encode()) for key, text in entries(file).items()}
        else:
            found[name] = sha256(file.read_bytes())
    return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entries(manifest: Path) -> dict[str, str]:
    value = json.loads(manifest.read_text())
    value.pop("versions")
    value["base"].pop("path")
    for adapter in value["adapters"]:
        adapter.pop("file")
    return {key: json.dumps(entry, sort_keys=True) for key, entry in value.items()}


def made_again(name: str, known: Inputs, scratch: Path) -> Digests:
    """Do one of `MERGES`, and take it out again where there is an undo."""
    planned, out = MERGES[name], scratch / "out"
    if not isinstance(planned, Merge):
        model, options = planned
        loratool.quantize(known.model(model), out=out, **options)
        return digests(out)
    model, options = known.model(planned.model), dict(planned.options)
    adapters = [
        known.adapter(each) if isinstance(each, str) else (known.adapter(each[0]), each[1]) for each in planned.adapters
    ]
    if "calibrate" in options:
        options["calibrate"] = known.text
    if options.get("in_place"):
        base = shutil.copytree(model, scratch / planned.model)
        loratool.merge(adapters, base, **options)
        out = base
    else:
        loratool.merge(adapters, model, out=out, **options)
    found = digests(out)
    if any(part.endswith("undo.st") for part in found):
        loratool.unmerge(out, out=scratch / "back")
        found["taken out"] = "its base" if digests(scratch / "back") == digests(model) else "not its base"
    return found


def differences(found: Mapping[str, Digests], expected: Mapping[str, Digests]) -> list[str]:
    lines = []
    for name, files in found.items():
        if name not in expected:
            lines.append(f"{name}: not recorded")
            continue
        other = expected[name]
        for part in sorted(files.keys() | other.keys()):
            if files.get(part) != other.get(part):
                what = "differs" if part in files and part in other else "is new" if part in files else "is gone"
                lines.append(f"{name}: {part} {what}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="Keep the digests.")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="Compare with digests that were kept.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="Only these merges.")
    arguments = parser.parse_args()
    names = arguments.names or list(MERGES)
    torch.set_num_threads(1)
    found: dict[str, Digests] = {}
    with tempfile.TemporaryDirectory(prefix="recorded-") as scratch:
        known = Inputs(Path(scratch))
        for name in names:
            print(f"  {name}", flush=True)
            with tempfile.TemporaryDirectory(dir=scratch) as own:
                found[name] = made_again(name, known, Path(own))
        models = sorted({model for model in inputs.MODELS if (Path(scratch) / "models" / model).exists()})
        found |= {f"input {model}": digests(known.model(model)) for model in models}
    shutil.rmtree(os.environ["LORATOOL_HOME"], ignore_errors=True)
    lines = [
        f"{name}: taken out, it is not its base" for name in names if found[name].get("taken out") == "not its base"
    ]
    if arguments.save:
        arguments.save.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if arguments.compare:
        lines += differences(found, json.loads(arguments.compare.read_text()))
    print("\n".join(lines) or f"{len(names)} merges, {sum(map(len, found.values()))} digests: all as they should be")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
