"""The table of results, `RESULTS.md`: each script writes its own section and leaves the others."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Each section is written by the script that it names (`python benchmarks/NAME.py --record`), which runs loratool and its
peer in turn. Times are medians of whole processes; machines are noisy, so read the ratios. "holds" compares with the
target in the same row.
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def holds(value: float, most: float | None = None, least: float | None = None) -> str:
    good = (most is None or value <= most) and (least is None or value >= least)
    return "holds" if good else "**does not hold**"


def report(name: str, title: str, body: str, script: str | None = None) -> None:
    """Print the section, and with --record put it in the place of its former one; `script` where it is not called so."""
    text = f"## {title}\n\n{_machine()}, `benchmarks/{script or name}.py`\n\n{body}\n"
    print("\n" + text)
    if "--record" not in sys.argv:
        return
    content = FILE.read_text() if FILE.exists() else HEAD
    section = f"<!-- {name} -->\n{text}<!-- /{name} -->\n"
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->\n", re.DOTALL)
    content = pattern.sub(lambda _: section, content) if pattern.search(content) else f"{content.rstrip()}\n\n{section}"
    FILE.write_text(content)


def _machine() -> str:
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    programs = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux, "
        f"Python {platform.python_version()}, {programs}"
    )
