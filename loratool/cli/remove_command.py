"""``loratool remove``."""

from __future__ import annotations

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import listed, print_facts, print_json


@click.command("remove", **example("loratool remove pirate@1\nloratool remove pirate --all --now"))
@click.argument("adapter")
@click.option("--all", "all_versions", is_flag=True, help="Remove every version.")
@click.option("--now", is_flag=True, help="Free its files at once, also if it is in the trash already.")
@json_option
@click.pass_obj
def command(registry: str | None, adapter: str, all_versions: bool, now: bool, as_json: bool) -> None:
    """Move an adapter into the trash, from which 'loratool restore' brings it back.

    'loratool doctor --gc' frees adapters that have been in the trash for 30 days. Files outside the store stay.
    """
    from loratool.library.remove import remove
    from loratool.library.reporting.adapter_json import adapter_json

    removed = remove(adapter, all_versions=all_versions, now=now, registry=registry)
    if as_json:
        print_json(
            [
                adapter_json(record)
                | {
                    "children": list(record.children),
                    "kept_until": None if record.kept_until is None else record.kept_until.isoformat(),
                }
                for record in removed
            ]
        )
        return
    for record in removed:
        click.echo(f"Removed {record.reference}")
        print_facts(
            [
                ("children", listed(record.children)),
                ("kept", "" if record.kept_until is None else f"until {record.kept_until:%Y-%m-%d}"),
                ("undo", "" if record.kept_until is None else f"loratool restore {record.reference}"),
            ]
        )
