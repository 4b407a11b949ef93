"""``loratool list``."""

from __future__ import annotations

from typing import Any

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import age, print_json, ranks, size, targets
from loratool.cli.table import print_table
from loratool.formats.kinds import KINDS

SORTS = ["name", "kind", "rank", "alpha", "base", "size", "age"]
COLUMNS = {"size": "size_bytes", "age": "created_at"}
"""The catalogue's columns for those with another name in the table."""


class SortType(click.Choice[str]):
    """A column of the table, by its name there or in the catalogue."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in COLUMNS.values():
            return value
        chosen = super().convert(value, param, ctx)
        return COLUMNS.get(chosen, chosen)


@click.command("list", **example("loratool list --base smollm2 --sort rank"))
@click.option(
    "--base", metavar="BASE", help="Only adapters of this base (a name, a folder or a Hub id) and its variants."
)
@click.option("--kind", type=click.Choice(list(KINDS)), metavar="KIND", help="Only adapters of this kind.")
@click.option("--tag", metavar="T", help="Only adapters with this tag.")
@click.option(
    "--sort",
    type=SortType(SORTS),
    default="name",
    show_default=True,
    help="Numbers and times: largest or newest first.",
)
@json_option
@click.pass_obj
def command(
    registry: str | None, base: str | None, kind: str | None, tag: str | None, sort: str, as_json: bool
) -> None:
    """List the adapters of the catalogue: name, version, kind, rank, alpha, targets, base, size and age."""
    from loratool.library.list import list_adapters
    from loratool.library.reporting.adapter_json import adapter_json

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
    has_tags = any(record.tags for record in found)
    rows = [
        [
            record.name,
            str(record.version),
            record.kind,
            ranks(record.kind, record.rank),
            "-" if record.alpha is None else f"{record.alpha:g}",
            targets(record.target_modules),
            record.base or "-",
            *([" ".join(record.tags) or "-"] if has_tags else []),
            size(record.size_bytes),
            age(record.created_at),
        ]
        for record in found
    ]
    tags = ["TAGS"] if has_tags else []
    columns = ["NAME", "V", "KIND", "RANK", "ALPHA", "TARGETS", "BASE", *tags, "SIZE", "AGE"]
    give_way = ["ALPHA", "SIZE", "AGE", "TARGETS", *tags, "RANK", "KIND"]
    print_table(columns, rows, right=("V", "RANK", "ALPHA", "SIZE", "AGE"), give_way=give_way)
