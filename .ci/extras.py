"""Each extra as a user gets it: an environment of what it brings and no more, in which the README's commands for it are run.

    make extras

An environment holds loratool's own wheel and the packages that the wheel asks for, in the versions of constraints.txt, as
links to the files in .venv: what a command needs and its extra does not bring is missing here, as it is for a user.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Extra:
    """An extra, the sections of the README whose commands it is for, and others that work, or fail with the way on."""

    name: str
    sections: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    fails: Mapping[str, str] | None = None


EXTRAS: Final = (
    Extra(
        "",
        ("Five minutes", "What training will take"),
        (
            "loratool truncate my --rank 2",
            "loratool combine my=0.5 my-r2=0.5 --method svd --out both.safetensors",
            "loratool show both --spectrum",
            "loratool export both --out both-peft",
            "loratool quantize my-base",
            "loratool extract models/my-base-my --base my-base --rank 4 --out extracted.safetensors",
            "loratool doctor --deep",
        ),
        {
            "loratool eval my-base --data examples/pirate.jsonl": "[train]",
            "loratool train --base my-base --data examples/pirate.jsonl --name mine": "[train]",
            "loratool show my --plot ranks.png": "[plot]",
        },
    ),
    Extra("plot", works=("loratool add my.safetensors", "loratool show my --plot ranks.png")),
    Extra(
        "train",
        ("Training", "Measuring"),
        (
            "loratool quantize smollm2",
            "loratool merge pirate --into smollm2-nf4 --calibrate examples/pirate.jsonl",
        ),
    ),
)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix=".extras-", dir=ROOT) as scratch:
        wheel = build_wheel(Path(scratch))
        for extra in EXTRAS:
            folder = Path(scratch) / (extra.name or "core")
            python = make_environment(folder / "environment", wheel, extra.name)
            run_commands(extra, folder / "work", python.parent)
    print(f"\n{len(EXTRAS)} passed, 0 failed")
    return 0


def build_wheel(folder: Path) -> Path:
    """Build loratool's wheel out of what git knows of the project."""
    source = folder / "source"
    for name in git_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    check_call([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)])
    return next(folder.glob("loratool-*.whl"))


def git_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    return [name for name in os.fsdecode(listed).split("\0") if name and (ROOT / name).is_file()]


def make_environment(folder: Path, wheel: Path, extra: str) -> Path:
    """Make an environment of loratool with an extra; its Python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    check_call(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ]
    )
    packages = next(folder.glob("lib/python*/site-packages"))
    own = Distribution.at(next(packages.glob("loratool-*.dist-info")))
    brought = closure(own, {extra})
    for package in brought.values():
        link_files(package, packages)
    print(f"\n== loratool{f'[{extra}]' if extra else ''}: {len(brought)} packages", flush=True)
    return python


def closure(package: Distribution, extras: set[str]) -> dict[str, Distribution]:
    """All packages that a package with these extras needs, as .venv has them."""
    pinned = re.findall(r"^(\S+?)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    allowed = {canonicalize_name(name): version for name, version in pinned}
    found: dict[str, Distribution] = {}
    waiting = list(requirements(package, extras))
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in done:
            continue
        done.add((name, frozenset(wanted.extras)))
        found[name] = distribution(wanted.name)
        version = found[name].version.partition("+")[0]
        if allowed.get(name) not in (None, version):
            sys.exit(f"{name} is {version} in .venv and {allowed[name]} in constraints.txt; make it anew: rm -r .venv")
        waiting += requirements(found[name], wanted.extras)
    return found


def requirements(package: Distribution, extras: set[str]) -> Iterator[Requirement]:
    """What a package asks for on this machine, with these extras."""
    for text in package.requires or ():
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield wanted


def link_files(package: Distribution, packages: Path) -> None:
    """Link the files of a package in .venv into other site-packages; its commands are left out."""
    for file in package.files or ():
        if ".." in file.parts:
            continue
        target = packages / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(str(file.locate()))
        if source.is_file() and not target.exists():
            os.link(source, target)


def run_commands(extra: Extra, work: Path, commands: Path) -> None:
    """Run the commands of an extra in a folder with a base, an adapter and samples, for a user who has nothing else."""
    prepare(work)
    home = work / "home"
    home.mkdir()
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(home), "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8"}
    typed = [line for section in extra.sections for line in readme_commands(section)]
    if extra.name == "train":
        typed.insert(0, "loratool base add smollm2 models/my-base")
    for line in [*typed, *extra.works]:
        run(line, work, environment)
    for line, said in (extra.fails or {}).items():
        run(line, work, environment, fails_with=said)
    check_results(extra, work)


def prepare(work: Path) -> None:
    """Make ``my-base`` and ``models/my-base``, a tiny model, ``my.safetensors``, an adapter of it, and the examples."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from tiny_adapters import save_plain_adapter
    from tiny_chat_model import save_tiny_chat_model

    import loratool

    base = save_tiny_chat_model(work / "my-base")
    shutil.copytree(base, work / "models" / "my-base")
    shutil.copytree(ROOT / "examples", work / "examples")
    shapes = {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in range(2)}
    os.environ["LORATOOL_HOME"] = str(work / "nowhere")
    loratool.export(save_plain_adapter(work / "drawn", shapes, r=4), work / "my.safetensors")


def readme_commands(section: str) -> list[str]:
    """The commands in the code blocks of a section of the README."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    commands = [line for line in found if line.startswith("loratool ")]
    if not commands:
        sys.exit(f"the README has no command in a section {section!r}")
    return commands


def run(line: str, work: Path, environment: Mapping[str, str], *, fails_with: str | None = None) -> None:
    """Run a command line; end with what it printed where it fails, or does not fail with the words that it should."""
    print(f"$ {line}", flush=True)
    words = shlex.split(line, comments=True)
    done = subprocess.run(words, cwd=work, env=dict(environment), capture_output=True, text=True, check=False)
    expected = 0 if fails_with is None else 1
    if done.returncode != expected or (fails_with or "") not in done.stderr or "unexpected" in done.stderr:
        sys.exit(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")


def check_results(extra: Extra, work: Path) -> None:
    """End where what the commands leave is not what the README says."""
    if not extra.name:
        base, back = work / "models" / "my-base", work / "models" / "my-base-my-unmerged"
        for file in base.iterdir():
            if file.read_bytes() != (back / file.name).read_bytes():
                sys.exit(f"{file.name} is not what it was after unmerge")
    pictures = {"": (), "plot": ("ranks.png",), "train": ("pirate.train.png",)}[extra.name]
    missing = [name for name in pictures if not (work / name).read_bytes().startswith(b"\x89PNG")]
    if missing:
        sys.exit(f"no picture: {', '.join(missing)}")


def check_call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
