"""``loratool show``."""

from __future__ import annotations

from collections import Counter

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import (
    age,
    console,
    count,
    counted,
    listed,
    print_json,
    ranks,
    shown,
    shown_path,
    size,
    targets,
)


@click.command("show", **example("loratool show pirate@1"))
@click.argument("adapter")
@json_option
@click.pass_obj
def command(registry: str | None, adapter: str, as_json: bool) -> None:
    """One adapter: everything the catalogue knows of it, its family and the merges it went into."""
    from loratool.library.adapters import ShowResult, show

    result: ShowResult = show(adapter, registry=registry)
    if as_json:
        print_json(result.to_json())
        return
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    record = result.record
    card = Table.grid(padding=(0, 2))
    card.add_column(style="dim", no_wrap=True)
    card.add_column(overflow="fold")
    newest = max(each.version for each in result.versions)
    facts = [
        ("kind", record.kind),
        ("ranks" if record.kind == "dylora" else "rank", _ranks(record.kind, record.ranks, record.rank)),
        ("alpha", "" if record.alpha is None else f"{record.alpha:g}"),
        ("scaling", _scaling(record.scaling)),
        ("targets", f"{targets(record.target_modules)}  ({counted(len(record.ranks or {}), 'module')})"),
        ("parameters", f"{count(record.parameter_count)}, {record.dtype}, {size(record.size_bytes)}"),
        ("sha256", record.sha256),
        ("base", _base(record.base, record.base_fingerprint, record.base_model)),
        ("tags", " ".join(record.tags)),
        ("added", f"{record.created_at:%Y-%m-%d %H:%M} UTC ({age(record.created_at)})"),
        ("versions", "" if newest == 1 else f"{newest} in all; this is {record.version}"),
        ("came from", listed([f"{edge.parent} by {edge.operation}" for edge in result.ancestors])),
        ("gave", listed([f"{edge.child} by {edge.operation}" for edge in result.descendants])),
        ("merges", listed([f"{shown_path(merge.output)} ({merge.state})" for merge in result.merges])),
    ]
    for key, value in facts:
        if value:
            card.add_row(key, Text("\n".join(map(shown, value.split("\n")))))
    console().print(Panel(card, title=Text(record.reference, style="bold"), title_align="left", expand=False))


def _ranks(kind: str, by_module: dict[str, int] | None, largest: int | None) -> str:
    """``8``, or where modules differ ``4 to 16 (4: 12 modules, 16: 3 modules)``; of a DyLoRA ``1..8``."""
    if kind == "dylora" or not by_module or len(set(by_module.values())) == 1:
        return ranks(kind, largest)
    modules = sorted(Counter(by_module.values()).items())
    parts = ", ".join(f"{rank}: {counted(number, 'module')}" for rank, number in modules[:6])
    return f"{modules[0][0]} to {modules[-1][0]} ({parts})"


def _scaling(scaling: float | dict[str, float] | None) -> str:
    if isinstance(scaling, dict):
        return f"{min(scaling.values()):g} to {max(scaling.values()):g}, by module"
    return "" if scaling is None else f"{scaling:g}"


def _base(name: str | None, fingerprint: str | None, recorded: str | None) -> str:
    exact = f"{name or 'not catalogued'} ({fingerprint[:16]}…)" if fingerprint else name or "tied to none"
    return f"{exact}\nrecorded as {recorded}" if recorded else exact
