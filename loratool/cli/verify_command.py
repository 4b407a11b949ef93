"""``loratool verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.merge_command import parse_spec
from loratool.cli.options import example, json_option
from loratool.cli.preload_torch import preload_torch
from loratool.cli.rendering import (
    ProgressBar,
    counted,
    delivered,
    print_facts,
    print_json,
    print_notes,
    shown,
    shown_path,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loratool.merging.delivery import Delivery

WORDS = {
    "base": "merging into the base again gives identical bytes",
    "undo": "taking the merge out gives the base's bytes",
}


@click.command(
    "verify",
    **example("loratool verify smollm2-pirate\nloratool verify --delivery their-merge --base smollm2 --adapter pirate"),
)
@click.argument("merged")
@click.option(
    "--delivery", is_flag=True, help="Measure what the model, merged by any tool, carries of its adapters instead."
)
@click.option("--base", metavar="BASE", help="With --delivery: the base; by default the one that loratool recorded.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="With --delivery: an adapter, by default those that loratool recorded; may be repeated.",
)
@click.option("--verbose", is_flag=True, help="Print the noise of the merge, too.")
@json_option
@click.pass_obj
def command(registry: str | None, merged: str, delivery: bool, base: str | None, adapters: tuple[str, ...], verbose: bool,
            as_json: bool) -> None:  # fmt: skip
    """Check a merged or quantized model against its manifest, byte by byte, and replay its merge.

    With --delivery, measure how much of the adapters' updates a model contains, in any storage and by whichever tool it was
    merged.
    """
    if not delivery and (base or adapters):
        raise click.UsageError("--base and --adapter belong to --delivery; give --delivery, or leave them out")
    preload_torch()
    if delivery:
        _measure(registry, merged, base, adapters, verbose=verbose, as_json=as_json)
        return
    from loratool.library.verify import verify

    with ProgressBar() as progress:
        result = verify(merged, registry=registry, progress=progress)
    if as_json:
        print_json(result.to_json())
        return
    click.echo(f"{click.style('Verified', fg='green')} {click.style(shown_path(result.path), bold=True)}")
    print_facts(
        [
            (
                "content",
                f"{counted(result.tensors, 'tensor')} and {counted(result.files, 'file')}, as the manifest says",
            ),
            (
                "edited",
                ", ".join(result.edited) + ", which do not affect its results" if result.edited else "",
            ),
            ("delivered", delivered(result.delivery, verbose=verbose) if result.delivery else ""),
            ("least delivered", _least(result.deliveries)),
            ("replay", WORDS.get(result.replayed, "")),
            ("fingerprint", result.fingerprint[:16] + "…"),
        ]
    )
    print_notes(result.notes)


def _measure(registry: str | None, merged: str, base: str | None, adapters: tuple[str, ...], *, verbose: bool,
             as_json: bool) -> None:  # fmt: skip
    from loratool.library.verify_delivery import verify_delivery

    with ProgressBar() as progress:
        result = verify_delivery(
            merged, [parse_spec(word) for word in adapters], base, registry=registry, progress=progress
        )
    if as_json:
        print_json(result.to_json())
        return
    carried = " and ".join(f"{each.share:.2f} of {shown(each.adapter)}" for each in result.adapters)
    click.echo(f"{click.style(shown_path(result.path), bold=True)} carries {carried}")
    unchanged = f"{len(result.unchanged):,} of {len(result.deliveries):,} parameters are as in the base"
    print_facts(
        [
            ("base", shown_path(result.base)),
            ("delivered", delivered(result.delivery, verbose=verbose)),
            ("least delivered", _least(result.deliveries)),
            ("unchanged", unchanged if result.unchanged else ""),
        ]
    )


def _least(deliveries: Mapping[str, Delivery]) -> str:
    """Format the parameter that carries the smallest share of its update."""
    if not deliveries:
        return ""
    name, delivery = min(deliveries.items(), key=lambda item: item[1].share)
    return f"{delivery.share:.1%} in {name}"
