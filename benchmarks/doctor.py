"""The doctor of a catalogue with 20,000 adapters, each with an entry in the store: time, CPU time and queries.

Its peer is what it did before: every adapter by queries of its own, and nothing of what is inside the entries.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from results import holds, report, table
from sqlalchemy import event

from registry import AdapterFacts, Registry

ADAPTERS = int(os.environ.get("ADAPTERS", "20000"))
MOST_CPU_SECONDS = 7.0
"""Half of the 14 seconds that one query for each adapter took."""
MODULES = 64


def main() -> None:
    home = Path(tempfile.mkdtemp(prefix="loratool-doctor-"))
    try:
        fill(home)
        with Registry.open(home, read_only=True) as registry:
            queries: list[str] = []
            event.listen(registry.database.engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
            rows = []
            for name, work, most in (
                ("doctor", registry.doctor.examine, MOST_CPU_SECONDS),
                ("doctor --deep", lambda: registry.doctor.examine(deep=True), None),
                ("peer: queries for each adapter", lambda: one_by_one(registry), None),
            ):
                queries.clear()
                wall, cpu = timed(work)
                rows.append([
                    name, f"{wall:.1f} s", f"{cpu:.1f} s", f"{len(queries):,}",
                    "" if most is None else f"{most:g} s of CPU: {holds(cpu, most=most)}",
                ])  # fmt: skip
        body = table(["", "wall", "CPU", "queries", "target"], rows)
        report("doctor", f"The doctor of {ADAPTERS:,} adapters", body)
    finally:
        shutil.rmtree(home)


def fill(home: Path) -> None:
    """A catalogue with small files, without waiting for the disk after each."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    try:
        with Registry.open(home) as registry, registry.writing():
            for number in range(ADAPTERS):
                files: dict[str, Path | bytes] = {
                    "adapter_model.safetensors": f"weights {number}".encode(),
                    "adapter_config.json": b"{}",
                }
                with registry.store.stage(files) as staged:
                    facts = AdapterFacts(
                        kind="lora",
                        sha256=staged.sha256["adapter_model.safetensors"],
                        size_bytes=staged.size_bytes,
                        rank=8,
                        ranks={f"model.layers.{module}.self_attn.q_proj": 8 for module in range(MODULES)},
                        alpha=16.0,
                        config={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]},
                    )
                    registry.adapters.add(f"adapter-{number}", facts, tags=["measured"], staged=staged)
    finally:
        os.fsync = fsync


def one_by_one(registry: Registry) -> None:
    for summary in registry.adapters.list():
        record = registry.adapters.get(summary.id)
        assert record is not None
        assert registry.adapters.files(record).is_dir()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    assert work() in (None, ())
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
