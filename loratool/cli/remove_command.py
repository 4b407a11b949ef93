"""``loratool remove``."""

from __future__ import annotations

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import print_json


@click.command("remove", **example("loratool remove pirate@1"))
@click.argument("adapter")
@click.option("--all", "all_versions", is_flag=True, help="Every version of it.")
@json_option
@click.pass_obj
def command(registry: str | None, adapter: str, all_versions: bool, as_json: bool) -> None:
    """Forget an adapter and free its files in the content store. Files elsewhere stay."""
    from loratool.library.adapters import adapter_json, remove

    removed = remove(adapter, all_versions=all_versions, registry=registry)
    if as_json:
        print_json([adapter_json(record) for record in removed])
        return
    for record in removed:
        click.echo(f"Removed {record.reference}")
