"""``loratool export``."""

from __future__ import annotations

import click

from loratool.cli.options import Alpha, PathType, alpha_option, example, force_option, json_option
from loratool.cli.rendering import print_json, shown_path


@click.command("export", **example("loratool export pirate --out pirate-peft"))
@click.argument("adapter")
@click.option("--out", required=True, type=PathType(), help="A folder, or a file ending in .safetensors or .st.")
@alpha_option
@force_option
@json_option
@click.pass_obj
def command(registry: str | None, adapter: str, out: str, alpha: Alpha | None, force: bool, as_json: bool) -> None:
    """Write an adapter as a PEFT folder, for PEFT and all programs that read its format, or as a single file.

    An adapter that loratool cannot merge yet is written as it was added, byte for byte.
    """
    from loratool.library.export import export

    path = export(adapter, out, alpha=alpha, force=force, registry=registry)
    if as_json:
        print_json({"out": str(path)})
        return
    click.echo(f"Wrote {shown_path(path)}")
