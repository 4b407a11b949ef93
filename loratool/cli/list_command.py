"""``loratool list``."""

from __future__ import annotations

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import age, print_json, print_table, ranks, size, targets

KINDS = ["lora", "dylora", "adalora"]
SORTS = ["name", "kind", "rank", "alpha", "base", "size_bytes", "created_at"]


@click.command("list", **example("loratool list --base smollm2 --sort rank"))
@click.option(
    "--base", metavar="BASE", help="Only adapters of this base (a name, a folder or a Hub id) and its variants."
)
@click.option("--kind", type=click.Choice(KINDS), help="Only adapters of this kind.")
@click.option("--tag", metavar="T", help="Only adapters with this tag.")
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    default="name",
    show_default=True,
    help="Numbers and times: largest or newest first.",
)
@json_option
@click.pass_obj
def command(
    registry: str | None, base: str | None, kind: str | None, tag: str | None, sort: str, as_json: bool
) -> None:
    """The catalogue of adapters: name, version, kind, rank, alpha, targets, base, size and age."""
    from loratool.library.adapters import adapter_json, list_adapters

    found = list_adapters(base=base, kind=kind, tag=tag, sort=sort, registry=registry)  # type: ignore[arg-type]
    if as_json:
        print_json([adapter_json(record) for record in found])
        return
    if not found:
        filtered = any((base, kind, tag))
        click.echo(
            "No adapter passes these filters."
            if filtered
            else "The catalogue is empty. Add an adapter with 'loratool add PATH'."
        )
        return
    rows = [
        [
            record.name,
            str(record.version),
            record.kind,
            ranks(record.kind, record.rank),
            "-" if record.alpha is None else f"{record.alpha:g}",
            targets(record.target_modules),
            record.base or "-",
            size(record.size_bytes),
            age(record.created_at),
        ]
        for record in found
    ]
    columns = ["NAME", "V", "KIND", "RANK", "ALPHA", "TARGETS", "BASE", "SIZE", "AGE"]
    print_table(columns, rows, right=("V", "RANK", "ALPHA", "SIZE", "AGE"), wide="TARGETS")
