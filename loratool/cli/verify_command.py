"""``loratool verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import example, json_option
from loratool.cli.preload_torch import preload_torch
from loratool.cli.rendering import (
    ProgressBar,
    counted,
    delivered,
    print_facts,
    print_json,
    print_notes,
    shown_path,
)

if TYPE_CHECKING:
    from loratool.library.verify import VerifyResult

WORDS = {
    "base": "merging into the base again gives identical bytes",
    "undo": "taking the merge out gives the base's bytes",
}


@click.command("verify", **example("loratool verify smollm2-pirate"))
@click.argument("merged")
@click.option("--verbose", is_flag=True, help="Print the noise of the merge, too.")
@json_option
@click.pass_obj
def command(registry: str | None, merged: str, verbose: bool, as_json: bool) -> None:
    """Check a merged or quantized model against its manifest, byte by byte, and replay its merge."""
    preload_torch()
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
            ("least delivered", _least(result)),
            ("replay", WORDS.get(result.replayed, "")),
            ("fingerprint", result.fingerprint[:16] + "…"),
        ]
    )
    print_notes(result.notes)


def _least(result: VerifyResult) -> str:
    """Format the parameter that carries the smallest share of its update."""
    if not result.deliveries:
        return ""
    name, delivery = min(result.deliveries.items(), key=lambda item: item[1].share)
    return f"{delivery.share:.1%} in {name}"
