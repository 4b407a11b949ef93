"""``loratool doctor``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import ProgressBar, age, counted, print_json, print_notes, shown, size
from loratool.cli.sentences import on_stderr

if TYPE_CHECKING:
    from loratool.library.doctor import DoctorResult
    from registry import NotSureError


@click.command("doctor", **example("loratool doctor --gc\nloratool doctor --rebuild"))
@click.option(
    "--gc",
    is_flag=True,
    help="Free files that nothing in the catalogue refers to; record which merged models are gone.",
)
@click.option("--deep", is_flag=True, help="Read every stored file and compare its sha256.")
@click.option(
    "--rebuild",
    is_flag=True,
    help="Restore entries that the store has and the catalogue has lost; repair damaged rows.",
)
@click.option(
    "--trash-days",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    metavar="N",
    help="With --gc: free what was removed N days ago.",
)
@click.option(
    "--yes", is_flag=True, help="With --gc: also free files that --rebuild could restore, or most of the store."
)
@json_option
@click.pass_obj
def command(
    registry: str | None, gc: bool, deep: bool, rebuild: bool, trash_days: int, yes: bool, as_json: bool
) -> None:
    """Check the catalogue against the disk. The exit status is 1 if something is wrong."""
    from loratool.library.doctor import doctor
    from registry import NotSureError

    def examined(sure: bool, rebuilding: bool) -> DoctorResult:
        with ProgressBar("bytes" if deep else "adapters") as progress:
            return doctor(
                gc=gc,
                deep=deep,
                rebuild=rebuilding,
                yes=sure,
                trash_days=trash_days,
                registry=registry,
                progress=progress,
            )

    try:
        result = examined(yes, rebuild)
    except NotSureError as doubt:
        _ask(doubt)
        result = examined(True, False)
    if as_json:
        print_json(_to_json(result))
    else:
        _print(result)
    sys.exit(1 if result.findings else 0)


def _ask(doubt: NotSureError) -> None:
    """Ask the user for confirmation on a terminal.

    Raises:
        NotSureError: there is no terminal.
        click.Abort: the answer is no.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise doubt
    click.echo(on_stderr(shown(str(doubt))), err=True)
    click.confirm("Free it for good?", abort=True, err=True)


def _to_json(result: DoctorResult) -> dict[str, object]:
    counts, rebuilt, freed = result.counts, result.rebuilt, result.freed
    return {
        "bases": counts.bases,
        "adapters": counts.adapters,
        "versions": counts.versions,
        "merges": counts.merges,
        "findings": [
            {
                "kind": finding.kind,
                "subject": finding.subject,
                "path": None if finding.path is None else str(finding.path),
                "message": finding.message,
            }
            for finding in result.findings
        ],
        "freed_bytes": freed.size_bytes if freed else 0,
        "noted_merges": freed.merges if freed else 0,
        "shared_with": list(freed.shared_with) if freed else [],
        "rebuilt": list(rebuilt.named) if rebuilt else [],
        "rebuilt_bases": list(rebuilt.bases) if rebuilt else [],
        "repaired": list(rebuilt.repaired) if rebuilt else [],
        "not_rebuilt": [str(finding.path) for finding in rebuilt.unnamed] if rebuilt else [],
        "trash": [each.reference for each in result.trash],
        "emptied": list(freed.emptied) if freed else [],
        "backups": [
            {"path": str(backup.path), "made_at": backup.made_at.isoformat(), "versions": backup.versions}
            for backup in result.backups
        ],
    }


def _print(result: DoctorResult) -> None:
    counts = result.counts
    click.echo(
        f"{counted(counts.adapters, 'adapter')} ({counted(counts.versions, 'version')}), "
        f"{counted(counts.bases, 'base')}, {counted(counts.merges, 'merge')}"
    )
    if result.rebuilt is not None:
        _print_rebuilt(result)
    if result.freed is not None:
        click.echo(f"Freed {size(result.freed.size_bytes)} in {counted(result.freed.entries, 'unnamed folder')}")
        if result.freed.emptied:
            click.echo(f"Emptied the trash of {', '.join(map(shown, result.freed.emptied))}")
        if result.freed.merges:
            click.echo(f"Recorded for {counted(result.freed.merges, 'merge')} that files are gone or exist again")
        others = ", ".join(map(shown, result.freed.shared_with))
        if others:
            print_notes([f"the store also holds files of {others}, so nothing in it was freed"])
    for finding in result.findings:
        click.echo(click.style("problem: ", fg="red") + shown(finding.message))
    if result.trash:
        held = f"{counted(len(result.trash), 'adapter')}, {size(sum(each.size_bytes for each in result.trash))}"
        click.echo(f"In the trash: {held}; 'loratool restore' lists them")
    if result.backups:
        newest = result.backups[0]
        made = age(newest.made_at).replace("now", "0 min")
        click.echo(f"Newest backup: {shown(str(newest.path))}, made {made} ago")
        if result.findings or not counts.versions:
            click.echo("To restore it:")
            click.echo(f"  {shown(result.put_back or '')}")
    if not result.findings:
        click.echo(click.style("All is well.", fg="green"))


def _print_rebuilt(result: DoctorResult) -> None:
    rebuilt = result.rebuilt
    assert rebuilt is not None
    if rebuilt.repaired:
        click.echo(f"Repaired the damaged {'row' if len(rebuilt.repaired) == 1 else 'rows'} of:")
        for what in rebuilt.repaired:
            click.echo(f"  {shown(what)}")
    if not (rebuilt.named or rebuilt.bases):
        click.echo("Restored nothing: the catalogue has all entries of the store's labels")
        return
    named = f"{counted(len(rebuilt.named), 'adapter')} and {counted(len(rebuilt.bases), 'base')}"
    click.echo(f"Restored {named}:")
    for reference in (*rebuilt.named, *rebuilt.bases):
        click.echo(f"  {shown(reference)}")
