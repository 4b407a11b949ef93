"""``loratool extract``."""

from __future__ import annotations

import shlex

import click

from loratool.cli.options import PathType, any_base_option, example, force_option, json_option
from loratool.cli.rendering import (
    ProgressBar,
    catalogued,
    counted,
    listed,
    percent,
    print_facts,
    print_json,
    print_notes,
    shown,
    shown_path,
    size,
    targets,
)


@click.command(
    "extract",
    **example(
        "loratool extract models/smollm2-tuned --base smollm2 --rank 16 --out tuned.safetensors\n"
        "loratool extract models/smollm2-tuned --base smollm2 --energy 0.9 --out tuned.safetensors"
    ),
)
@click.argument("tuned")
@click.option("--base", required=True, metavar="BASE", help="The model that TUNED was trained from.")
@click.option("--rank", type=int, metavar="R", help="The rank of every module.")
@click.option(
    "--energy", type=float, metavar="E", help="Instead of --rank: the share of each difference's energy to keep."
)
@click.option("--keep-full", is_flag=True, help="Keep changed norms, embeddings and biases whole (modules_to_save).")
@click.option("--out", required=True, type=PathType(), metavar="FILE", help="A file (.safetensors, .st) or a folder.")
@click.option("--name", metavar="N", help="Its name in the catalogue; by default the file's name.")
@force_option
@any_base_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    tuned: str,
    base: str,
    rank: int | None,
    energy: float | None,
    keep_full: bool,
    out: str,
    name: str | None,
    force: bool,
    any_base: bool,
    as_json: bool,
) -> None:
    """Make an adapter from the difference between a fine-tuned model and its base, and measure its error.

    TUNED and BASE are catalogued names, folders, safetensors files or Hub ids. They are streamed, not loaded whole.
    """
    from loratool.library.extract import extract

    if (rank is None) == (energy is None):
        raise click.UsageError("give one of --rank and --energy")
    with ProgressBar() as progress:
        result = extract(
            tuned,
            base,
            out=out,
            rank=rank,
            energy=energy,
            keep_full=keep_full,
            name=name,
            force=force,
            any_base=any_base,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    record, found = result.record, result.extraction
    click.echo(
        f"Extracted {click.style(shown(result.tuned), bold=True)} minus {click.style(shown(result.base), bold=True)}"
    )
    ranks = sorted(set(found.ranks.values()))
    unchanged = f", {found.unchanged} unchanged" if found.unchanged else ""
    print_facts(
        [
            ("written to", shown_path(result.out)),
            ("catalogued", catalogued(record)),
            ("targets", f"{targets(record.target_modules)}  ({counted(len(found.ranks), 'module')}{unchanged})"),
            ("rank", f"{ranks[0]} to {ranks[-1]}" if ranks[1:] else f"{ranks[0]}"),
            ("error", f"{percent(found.error)} of the difference (Frobenius norm), measured on the factors"),
            (
                "randomized",
                f"{counted(len(found.randomized), 'module')}, the others exactly" if found.randomized else "",
            ),
            ("kept whole", listed([shown(module) for module in found.kept_modules])),
            ("size", f"{size(record.size_bytes)} {record.dtype}"),
            (
                "next",
                f"loratool merge {shlex.quote(record.name)} --into {record.base}"
                if record.is_catalogued and record.base
                else "",
            ),
        ]
    )
    print_notes(result.notes)
