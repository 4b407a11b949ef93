"""``loratool hub``."""

from __future__ import annotations

import click

from loratool.cli.options import ExampleGroup, example, json_option
from loratool.cli.rendering import age, print_json
from loratool.cli.table import print_table

SORTS = ["downloads", "likes", "updated", "created"]


@click.group("hub", cls=ExampleGroup, epilog="loratool hub search pirate\nloratool hub search --base smollm2")
def hub() -> None:
    """Search the Hugging Face Hub."""


command = hub


@hub.command("search", **example("loratool hub search --base smollm2\nloratool hub search pirate --sort updated"))
@click.argument("text", required=False)
@click.option(
    "--base",
    metavar="BASE",
    help="List adapters of this base: a Hub id, or the name or folder of a base from the Hub.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    metavar="N",
    help="The largest number of adapters to list.",
)
@click.option(
    "--sort",
    type=click.Choice(SORTS),
    default="downloads",
    show_default=True,
    help="The order, highest or newest first. Downloads are those of the last 30 days.",
)
@json_option
@click.pass_obj
def search(registry: str | None, text: str | None, base: str | None, limit: int, sort: str, as_json: bool) -> None:
    """List adapters on the Hub whose names contain TEXT, those of a base, or both."""
    from loratool.library.hub_search import hub_search

    if not text and base is None:
        raise click.UsageError("give a TEXT, or --base BASE")
    found = hub_search(text, base=base, limit=limit, sort=sort, registry=registry)  # type: ignore[arg-type]
    if as_json:
        print_json([each.to_json() for each in found])
        return
    if not found:
        click.echo("The Hub has no such adapter.")
        return
    rows = [
        [
            each.repo,
            "-" if each.downloads is None else f"{each.downloads:,}",
            "-" if each.likes is None else f"{each.likes:,}",
            "-" if each.updated_at is None else age(each.updated_at),
            (each.license or "-") + (" (gated)" if each.gated else ""),
        ]
        for each in found
    ]
    columns = ["REPO", "DOWNLOADS", "LIKES", "UPDATED", "LICENSE"]
    print_table(
        columns, rows, right=("DOWNLOADS", "LIKES", "UPDATED"), give_way=("LICENSE", "LIKES", "UPDATED", "DOWNLOADS")
    )
    if len(found) == limit:
        click.echo(f"These are the first {limit}; --limit shows more. Get one with 'loratool pull REPO'.")
    else:
        click.echo("Get one with 'loratool pull REPO'.")
