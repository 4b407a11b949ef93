"""``loratool base``."""

from __future__ import annotations

import click

from loratool.cli.options import ExampleGroup, PathType, example, json_option
from loratool.cli.rendering import (
    ProgressBar,
    age,
    count,
    listed,
    print_facts,
    print_json,
    print_notes,
    shown_path,
    size,
)
from loratool.cli.table import print_table


@click.group("base", cls=ExampleGroup, epilog="loratool base add smollm2 models/smollm2\nloratool base list")
def base() -> None:
    """Name and fingerprint base models."""


command = base


@base.command("add", **example("loratool base add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct"))
@click.argument("name")
@click.argument("source", type=PathType())
@click.option(
    "--variant-of",
    metavar="BASE",
    help="The base (a name, a folder or a Hub id) of which this is the same model in a different storage.",
)
@click.option(
    "--hub-id", metavar="ID", help="The Hub model that the folder holds. Pushed adapters name it as their base."
)
@click.option("--download", is_flag=True, help="Download a base on the Hub now instead of at its first use.")
@json_option
@click.pass_obj
def add_base(
    registry: str | None,
    name: str,
    source: str,
    variant_of: str | None,
    hub_id: str | None,
    download: bool,
    as_json: bool,
) -> None:
    """Catalogue the model in a folder or at a Hub id under NAME, with the fingerprint of its content.

    For a base on the Hub, only headers are read at first. Its weights are downloaded when they are needed.
    """
    from loratool.errors import quoted
    from loratool.library.bases import base_add, base_json
    from loratool.library.resolving.hub_bases import is_away

    with ProgressBar() as progress:
        record = base_add(
            name,
            source,
            variant_of=variant_of,
            hub_id=hub_id,
            download=download,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(base_json(record))
        return
    click.echo(f"Added base {click.style(record.name, bold=True)}")
    print_facts(
        [
            ("model", " ".join(filter(None, [record.architecture, count(record.parameter_count), record.dtype]))),
            ("size", size(record.size_bytes or 0)),
            ("fingerprint", f"{record.fingerprint[:16]}…" if record.fingerprint else ""),
            ("from", "" if record.revision is None else f"{record.source}@{record.revision[:12]}"),
            ("weights", "not downloaded yet; --download gets them now" if is_away(record) else ""),
            ("at", shown_path(record.path) if record.path and not is_away(record) else ""),
            ("variant of", record.variant_of or ""),
            ("next", f"loratool add ADAPTER --base {record.name}"),
        ]
    )
    if record.same_as:
        names = " and ".join(map(quoted, record.same_as))
        print_notes([f"the same content is already catalogued as {names}; all its names have the same adapters"])


@base.command("list", **example("loratool base list"))
@json_option
@click.pass_obj
def list_bases(registry: str | None, as_json: bool) -> None:
    """List the catalogued bases."""
    from loratool.library.bases import base_json, base_list
    from loratool.library.resolving.hub_bases import is_away

    found = base_list(registry=registry)
    if as_json:
        print_json([base_json(record) for record in found])
        return
    if not found:
        click.echo("No base is catalogued. Add one with 'loratool base add NAME SOURCE'.")
        return
    has_variants = any(record.variant_of for record in found)
    rows = [
        [
            record.name,
            record.model_type or "-",
            count(record.parameter_count),
            record.dtype or "-",
            size(record.size_bytes or 0),
            "not downloaded" if is_away(record) else (record.fingerprint or "-")[:12],
            *([record.variant_of or "-"] if has_variants else []),
            age(record.created_at),
        ]
        for record in found
    ]
    variant = ["VARIANT OF"] if has_variants else []
    columns = ["NAME", "TYPE", "PARAMS", "DTYPE", "SIZE", "FINGERPRINT", *variant, "AGE"]
    print_table(
        columns,
        rows,
        right=("PARAMS", "SIZE", "AGE"),
        give_way=("AGE", "FINGERPRINT", "DTYPE", "TYPE", "SIZE", "PARAMS"),
    )


@base.command("show", **example("loratool base show smollm2"))
@click.argument("name", metavar="BASE")
@json_option
@click.pass_obj
def show_base(registry: str | None, name: str, as_json: bool) -> None:
    """Show a base, its adapters and the merges into it. BASE is its name, its folder or its Hub id."""
    from loratool.library.bases import base_show
    from loratool.library.resolving.hub_bases import is_away

    result = base_show(name, registry=registry)
    if as_json:
        print_json(result.to_json())
        return
    record = result.record
    click.echo(click.style(record.name, bold=True))
    print_facts(
        [
            ("model", " ".join(filter(None, [record.architecture, count(record.parameter_count), record.dtype]))),
            ("size", size(record.size_bytes or 0)),
            ("fingerprint", record.fingerprint or ""),
            ("weights", "not downloaded" if is_away(record) else ""),
            ("from", "" if record.source == str(record.path) else record.source),
            ("revision", record.revision or ""),
            ("at", shown_path(record.path) if record.path and not is_away(record) else ""),
            ("variant of", record.variant_of or ""),
            ("same as", listed(record.same_as)),
            ("added", f"{record.created_at:%Y-%m-%d %H:%M} UTC ({age(record.created_at)})"),
            ("adapters", listed([adapter.reference for adapter in result.adapters])),
            ("merges", listed([f"{shown_path(merge.output)} ({merge.state})" for merge in result.merges])),
        ]
    )


@base.command("verify", **example("loratool base verify smollm2"))
@click.argument("name", metavar="BASE")
@json_option
@click.pass_obj
def verify_base(registry: str | None, name: str, as_json: bool) -> None:
    """Read every byte of a base again and compare its fingerprint."""
    from loratool.library.bases import base_json, base_verify

    with ProgressBar() as progress:
        record = base_verify(name, registry=registry, progress=progress)
    if as_json:
        print_json(base_json(record))
        return
    click.echo(f"{click.style('Verified', fg='green')} {record.name}: every byte is what was catalogued")


@base.command("remove", **example("loratool base remove smollm2"))
@click.argument("name", metavar="BASE")
@click.option("--force", is_flag=True, help="Forget it even if adapters belong to it. They keep its fingerprint.")
@json_option
@click.pass_obj
def remove_base(registry: str | None, name: str, force: bool, as_json: bool) -> None:
    """Forget a base. Its files stay."""
    from loratool.library.bases import base_json, base_remove

    record = base_remove(name, force=force, registry=registry)
    if as_json:
        print_json(base_json(record))
        return
    click.echo(f"Forgot base {record.name}; its files stay")
