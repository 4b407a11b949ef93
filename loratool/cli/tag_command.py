"""``loratool tag``."""

from __future__ import annotations

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import print_json


@click.command("tag", **example("loratool tag pirate speech demo"))
@click.argument("adapter")
@click.argument("tags", nargs=-1, required=True, metavar="TAG...")
@click.option("--remove", is_flag=True, help="Remove the tags instead.")
@json_option
@click.pass_obj
def command(registry: str | None, adapter: str, tags: tuple[str, ...], remove: bool, as_json: bool) -> None:
    """Add tags to an adapter, or remove them."""
    from loratool.library.reporting.adapter_json import adapter_json
    from loratool.library.tag import tag

    record = tag(adapter, tags, remove=remove, registry=registry)
    if as_json:
        print_json(adapter_json(record))
        return
    word = "the tag" if len(record.tags) == 1 else "the tags" if record.tags else "no tags"
    click.echo(" ".join([record.reference, "has", word, *record.tags]))
