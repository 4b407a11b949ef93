"""``loratool unmerge``."""

from __future__ import annotations

import time

import click

from loratool.cli.options import PathType, device_option, example, force_option, json_option
from loratool.cli.preload_torch import preload_torch
from loratool.cli.rendering import ProgressBar, counted, duration, print_facts, print_json, print_notes, shown_path

WORDS = {
    "undo": "by its undo file, bit for bit",
    "base": "from the base, bit for bit",
    "approximate": "by arithmetic, approximately",
}


@click.command("unmerge", **example("loratool unmerge smollm2-pirate --out smollm2-again"))
@click.argument("merged")
@click.option("--out", type=PathType(), metavar="DIR", help="The new folder; by default MERGED-unmerged beside it.")
@click.option("--in-place", is_flag=True, help="Restore the merged model's own files.")
@click.option(
    "--approximate", is_flag=True, help="Without undo file and base: subtract the update, with rounding errors."
)
@force_option
@device_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    merged: str,
    out: str | None,
    in_place: bool,
    approximate: bool,
    force: bool,
    device: str,
    as_json: bool,
) -> None:
    """Take the last merge out of a merged model, bit for bit, with its undo file or else from the base."""
    preload_torch()
    from loratool.library.unmerge import unmerge

    if in_place and out:
        raise click.UsageError("give --out or --in-place, not both")
    started = time.monotonic()
    with ProgressBar() as progress:
        result = unmerge(
            merged,
            out=out,
            in_place=in_place,
            approximate=approximate,
            force=force,
            device=device,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    click.echo(f"Unmerged {click.style(shown_path(result.out), bold=True)}")
    print_facts(
        [
            ("how", WORDS[result.method]),
            ("fingerprint", f"{result.fingerprint[:16]}…, the base's own" if result.fingerprint else ""),
            ("not exact", counted(len(result.inexact), "tensor") if result.inexact else ""),
            ("time", duration(time.monotonic() - started)),
        ]
    )
    print_notes(result.notes)
