"""``loratool restore``."""

from __future__ import annotations

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import age, print_json, size
from loratool.cli.table import print_table


@click.command("restore", **example("loratool restore pirate@1"))
@click.argument("adapter", required=False)
@click.option("--all", "all_versions", is_flag=True, help="Every version of it.")
@json_option
@click.pass_obj
def command(registry: str | None, adapter: str | None, all_versions: bool, as_json: bool) -> None:
    """Restore a removed adapter from the trash. Without an adapter, list the trash."""
    from loratool.library.reporting.adapter_json import adapter_json
    from loratool.library.restore import restore

    if adapter is None:
        _list(registry, as_json)
        return
    restored = restore(adapter, all_versions=all_versions, registry=registry)
    if as_json:
        print_json([adapter_json(each.record) | {"was": each.was} for each in restored])
        return
    for each in restored:
        was = "" if each.was == each.record.reference else f" (it was {each.was}; another has that version now)"
        click.echo(f"Restored {each.record.reference}{was}")


def _list(registry: str | None, as_json: bool) -> None:
    from loratool.library.restore import trash

    removed = trash(registry=registry)
    if as_json:
        print_json(
            [
                {
                    "name": each.name,
                    "version": each.version,
                    "kind": each.kind,
                    "sha256": each.sha256,
                    "size_bytes": each.size_bytes,
                    "removed_at": each.removed_at.isoformat(),
                }
                for each in removed
            ]
        )
    elif not removed:
        click.echo("The trash is empty.")
    else:
        rows = [
            [each.name, str(each.version), each.kind, size(each.size_bytes), age(each.removed_at)] for each in removed
        ]
        print_table(["NAME", "V", "KIND", "SIZE", "REMOVED"], rows, right=("V", "SIZE", "REMOVED"), give_way=["KIND"])
