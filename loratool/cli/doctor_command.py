"""``loratool doctor``."""

from __future__ import annotations

import sys

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import counted, print_json, print_notes, shown, size


@click.command("doctor", **example("loratool doctor --gc"))
@click.option("--gc", is_flag=True, help="Free what nothing in the catalogue names; note which merged models are gone.")
@click.option("--deep", is_flag=True, help="Read every stored file and compare its sha256.")
@json_option
@click.pass_obj
def command(registry: str | None, gc: bool, deep: bool, as_json: bool) -> None:
    """Check the catalogue against the disk. Exit status 1 where something is wrong."""
    from loratool.library.doctor import doctor

    result = doctor(gc=gc, deep=deep, registry=registry)
    counts = result.counts
    if as_json:
        print_json(
            {
                "bases": counts.bases,
                "adapters": counts.adapters,
                "versions": counts.versions,
                "merges": counts.merges,
                "findings": [
                    {"kind": finding.kind, "subject": finding.subject, "message": finding.message}
                    for finding in result.findings
                ],
                "freed_bytes": result.freed.size_bytes if result.freed else 0,
                "noted_merges": result.freed.merges if result.freed else 0,
                "shared_with": list(result.freed.shared_with) if result.freed else [],
            }
        )
    else:
        click.echo(
            f"{counted(counts.adapters, 'adapter')} ({counted(counts.versions, 'version')}), "
            f"{counted(counts.bases, 'base')}, {counted(counts.merges, 'merge')}"
        )
        if result.freed is not None:
            click.echo(f"Freed {size(result.freed.size_bytes)} in {counted(result.freed.entries, 'unnamed folder')}")
            if result.freed.merges:
                click.echo(f"Noted of {counted(result.freed.merges, 'merge')} what is gone or there again")
            others = ", ".join(map(shown, result.freed.shared_with))
            if others:
                print_notes([f"the store also holds files of {others}, so nothing in it was freed"])
        for finding in result.findings:
            click.echo(click.style("problem: ", fg="red") + shown(finding.message))
        if not result.findings:
            click.echo(click.style("All is well.", fg="green"))
    sys.exit(1 if result.findings else 0)
