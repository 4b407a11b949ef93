"""``loratool show``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.cli.family_tree import family_tree
from loratool.cli.options import Alpha, PathType, alpha_option, example, json_option
from loratool.cli.rendering import (
    age,
    console,
    count,
    counted,
    delivered,
    listed,
    print_json,
    ranks,
    shown,
    shown_adapter,
    shown_path,
    size,
    targets,
)
from loratool.cli.spectrum_view import print_spectrum
from loratool.formats.kinds import kind_named

if TYPE_CHECKING:
    from loratool.library.show import ShowResult
    from loratool.library.spectrum import SpectrumResult
    from registry import AdapterRecord, MergeRecord


AROUND_A_FACT: Final = 16
"""Width that a line of the card needs besides the fact: for the border and the longest label, ``parameters``."""

MOST_RANKS: Final = 12
"""Largest number of different ranks that are listed."""


@click.command(
    "show",
    **example("loratool show pirate@1\nloratool show pirate --spectrum\nloratool show pirate --plot pirate-ranks.png"),
)
@click.argument("adapter")
@click.option("--spectrum", "with_spectrum", is_flag=True, help="Singular values, and the energy kept at each rank.")
@click.option("--plot", type=PathType(), metavar="FILE", help="Draw a heat map by layer and module: .png, .svg, .pdf.")
@click.option("--force", is_flag=True, help="Replace a picture that loratool drew.")
@alpha_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    adapter: str,
    with_spectrum: bool,
    plot: str | None,
    force: bool,
    alpha: Alpha | None,
    as_json: bool,
) -> None:
    """Show everything that is known about one adapter, its family and its merges.

    ADAPTER is a catalogued name (pirate or pirate@2), a path or a Hub id.
    """
    from loratool.library.show import show

    result = show(adapter, alpha=alpha, registry=registry)
    spectrum = _spectrum(adapter, plot, force, alpha, registry) if with_spectrum or plot else None
    if as_json:
        print_json(result.to_json() | (spectrum.to_json() if spectrum else {}))
        return
    _print_card(result)
    if spectrum and with_spectrum:
        print_spectrum(spectrum)
    if spectrum and spectrum.plot:
        click.echo(f"Drew {shown_path(spectrum.plot)}")


def _spectrum(adapter: str, plot: str | None, force: bool, alpha: Alpha | None, registry: str | None) -> SpectrumResult:
    from loratool.library.spectrum import spectrum

    return spectrum(adapter, plot=plot, force=force, alpha=alpha, registry=registry)


def _print_card(result: ShowResult) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    record = result.record
    card = Table.grid(padding=(0, 2))
    card.add_column(style="dim", no_wrap=True)
    card.add_column(overflow="fold")
    newest = max((each.version for each in result.versions), default=1)
    title = record.reference if result.place is None else f"{shown_adapter(result.place)} (not in the catalogue)"
    facts = [
        ("kind", record.kind),
        ("format", _format(record.format)),
        ("ranks" if kind_named(record.kind).nested else "rank", _ranks(record.kind, record.ranks, record.rank)),
        ("alpha", "" if record.alpha is None else f"{record.alpha:g}"),
        ("scaling", _scaling(record.scaling)),
        ("works with", _working(result)),
        ("refused", _refused(result)),
        ("effect", f"changes nothing: {result.changes_nothing}" if result.changes_nothing else ""),
        ("beside it", _beside(result.trained_beside)),
        ("targets", _targets(record)),
        ("parameters", f"{count(record.parameter_count)}, {record.dtype}, {size(record.size_bytes)}"),
        ("loss", _loss(record.metrics or {})),
        ("trained", _training(record.recipe or {})),
        ("sha256", record.sha256),
        ("base", _base(record.base, record.base_fingerprint, record.base_model)),
        ("on the Hub", listed(hub_places(record), 3)),
        ("tags", " ".join(record.tags)),
        ("added", "" if result.place else f"{record.created_at:%Y-%m-%d %H:%M} UTC ({age(record.created_at)})"),
        ("versions", "" if newest == 1 else f"{newest} in all; this is {record.version}"),
        ("family", family_tree(record, (*result.ancestors, *result.descendants), console().width - AROUND_A_FACT)),
        ("merges", listed([_merge(merge) for merge in result.merges])),
    ]
    for key, value in facts:
        if value:
            card.add_row(key, Text("\n".join(map(shown, value.split("\n")))))
    console().print(Panel(card, title=Text(shown(title), style="bold"), title_align="left", expand=False))


def _format(name: str | None) -> str:
    """The title of the format of an adapter's files; empty for the one in which loratool writes adapters."""
    from loratool.formats.table import FORMATS, OWN

    titles = {row.name: row.title for row in FORMATS if row is not OWN}
    return titles.get(name, "") if name else ""


def _working(result: ShowResult) -> str:
    """Return the commands that work on an adapter that loratool does not compute."""
    from loratool.library.checking.commands_for import WORKS

    return ", ".join(name for name, outcome in result.commands.items() if outcome == WORKS) if result.why_not else ""


def _refused(result: ShowResult) -> str:
    """Return the commands that do not work on it, and why."""
    from loratool.library.checking.commands_for import WORKS

    refused = ", ".join(name for name, outcome in result.commands.items() if outcome != WORKS)
    return f"{refused}\n{result.why_not}" if result.why_not else ""


def _beside(names: Sequence[str]) -> str:
    """Return the files with weights that were trained with the adapter."""
    return f"{listed(names, 3)}\ntrained with it, and in no merge" if names else ""


def hub_places(record: AdapterRecord) -> list[str]:
    """Return an adapter's places on the Hub, such as ``owner/name/path@commit``, latest first."""
    return [
        "/".join(filter(None, [place.repo, place.path_in_repo])) + (f"@{place.revision[:12]}" if place.revision else "")
        for place in reversed(record.locations)
        if place.repo
    ]


def _loss(metrics: Mapping[str, Any]) -> str:
    """Return the recorded losses: ``2.654 (perplexity 14.2), 4.268 before training, on held-out samples``."""
    loss, perplexity, before = (metrics.get(key) for key in ("loss", "perplexity", "loss_before"))
    if not isinstance(loss, float):
        return ""
    said = [f"{loss:.3f}" + (f" (perplexity {perplexity:.3g})" if isinstance(perplexity, float) else "")]
    if isinstance(before, float):
        said.append(f"{before:.3f} before training")
    if metrics.get("held_out"):
        said.append("on held-out samples")
    return ", ".join(said)


def _training(recipe: Mapping[str, Any]) -> str:
    """Return the recorded facts of the training: ``54 steps of 4 samples of pirate.jsonl (80), lr 0.001, seed 0``."""
    words = {
        "steps": "{} steps",
        "batch_size": "of {} samples",
        "data": "of {}",
        "samples": "({} in all)",
        "lr": "at lr {}",
        "quantize": "beside {}",
        "seed": "with seed {}",
    }
    return " ".join(form.format(recipe[key]) for key, form in words.items() if recipe.get(key) is not None)


def _merge(merge: MergeRecord) -> str:
    """Return a merge's output and state, and for quantized weights the delivered share of the update."""
    from loratool.library.show import delivery_of

    delivery = delivery_of(merge)
    share = "" if delivery is None else f", delivered {delivered(delivery)}"
    return f"{shown_path(merge.output)} ({merge.state}{share})"


def _targets(record: AdapterRecord) -> str:
    """Return the targets: ``q_proj, v_proj  (60 modules)``, without the number if no module has a rank."""
    modules = f"  ({counted(len(record.ranks), 'module')})" if record.ranks else ""
    return f"{targets(record.target_modules)}{modules}" if record.target_modules or modules else ""


def _ranks(kind: str, by_module: dict[str, int] | None, largest: int | None) -> str:
    """Return the ranks: ``8``, ``4 to 16  (modules of each: 4: 12, 16: 3)`` if modules differ, ``1..8`` for a DyLoRA."""
    if largest is None:
        return ""
    if kind_named(kind).nested or not by_module or len(set(by_module.values())) == 1:
        return ranks(kind, largest)
    modules = sorted(Counter(by_module.values()).items())
    parts = [f"{rank}: {number}" for rank, number in modules]
    shown_parts = ", ".join(parts if len(parts) <= MOST_RANKS else [*parts[: MOST_RANKS - 1], "..."])
    return f"{modules[0][0]} to {modules[-1][0]}  (modules of each: {shown_parts})"


def _scaling(scaling: float | dict[str, float] | None) -> str:
    if isinstance(scaling, dict):
        return f"{min(scaling.values()):g} to {max(scaling.values()):g}, by module"
    return "" if scaling is None else f"{scaling:g}"


def _base(name: str | None, fingerprint: str | None, recorded: str | None) -> str:
    exact = f"{name or 'not catalogued'} ({fingerprint[:16]}…)" if fingerprint else name or "not tied to a base"
    return f"{exact}\nrecorded as {recorded}" if recorded not in (None, name) else exact
