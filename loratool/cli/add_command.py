"""``loratool add``."""

from __future__ import annotations

import click

from loratool.cli.options import Alpha, PathType, alpha_option, any_base_option, example, json_option
from loratool.cli.rendering import ProgressBar, print_facts, print_json, print_notes, size, targets


@click.command("add", **example("loratool add pirate.safetensors --base smollm2 --tag speech"))
@click.argument("path", type=PathType())
@click.option(
    "--name",
    metavar="N",
    help="Its name in the catalogue; by default that of its folder or file, or of the folder above if that is generic.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="The base that it belongs to: a catalogued name, a folder (then catalogued), or a Hub id.",
)
@any_base_option
@alpha_option
@click.option("--tag", "tags", multiple=True, metavar="T", help="A word to find it by; may be given several times.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    path: str,
    name: str | None,
    base: str | None,
    any_base: bool,
    alpha: Alpha | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Catalogue an adapter: a folder or a single file of any kind and format that loratool can identify.

    An adapter that cannot be merged yet is catalogued, too; 'loratool show' says which commands work on it. The files are copied
    into the content store. Another adapter of the same name, base and targets becomes the next version. An adapter of another
    base or other targets needs its own name, with --name.
    """
    from loratool.library.add import add
    from loratool.library.reporting.adapter_json import adapter_json

    with ProgressBar() as progress:
        result = add(
            path,
            name=name,
            base=base,
            any_base=any_base,
            alpha=alpha,
            tags=tags,
            registry=registry,
            progress=progress,
        )
    record = result.record
    if as_json:
        print_json({**adapter_json(record), "new": result.new, "notes": list(result.notes)})
        return
    click.echo(f"{'Added' if result.new else 'Already there:'} {click.style(record.reference, bold=True)}")
    print_facts(
        [
            ("kind", ", ".join([record.kind, *_numbers(record.rank, record.alpha)])),
            ("targets", targets(record.target_modules)),
            ("base", record.base or ""),
            ("size", f"{size(record.size_bytes)} {record.dtype}"),
            ("sha256", record.sha256[:16] + "…"),
            ("next", f"loratool merge {record.name} --into {record.base}" if record.base and result.new else ""),
        ]
    )
    print_notes(result.notes)


def _numbers(rank: int | None, alpha: float | None) -> list[str]:
    return [*([] if rank is None else [f"rank {rank}"]), *([] if alpha is None else [f"alpha {alpha:g}"])]
