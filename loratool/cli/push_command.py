"""``loratool push``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from loratool.cli.options import Alpha, PathType, alpha_option, example, json_option
from loratool.cli.rendering import ProgressBar, counted, print_facts, print_json, print_notes, shown, size
from loratool.cli.table import print_table

if TYPE_CHECKING:
    from loratool.library.push import PushResult


@click.command(
    "push",
    **example(
        "loratool push\nloratool push pirate ada/pirate --private\nloratool push pirate --dry-run\n"
        "loratool push smollm2-pirate ada/smollm2-pirate --merged"
    ),
)
@click.argument("adapter", required=False)
@click.argument("repository", metavar="[REPO]", required=False)
@click.option("--merged", is_flag=True, help="Push a merged or quantized model: ADAPTER is its folder or name.")
@click.option(
    "--file",
    "files",
    multiple=True,
    type=PathType(),
    metavar="FILE",
    help="With --merged: also send this file that you added.",
)
@click.option("--all-files", is_flag=True, help="With --merged: also send all files that you added.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Propose the files in a pull request.")
@click.option("--revision", metavar="R", help="The branch, which is made if it is missing.")
@click.option("--message", metavar="M", help="The commit's message.")
@click.option("--license", metavar="L", help="The license, as the Hub calls it: apache-2.0, mit, ...")
@click.option(
    "--base-model", metavar="ID", help="The Hub id of its base, if it is not known; 'none' for a base that has none."
)
@click.option("--dry-run", is_flag=True, help="Show the files and the card; send nothing.")
@click.option("--yes", is_flag=True, help="Make a public repository without asking.")
@alpha_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    adapter: str | None,
    repository: str | None,
    merged: bool,
    files: tuple[str, ...],
    all_files: bool,
    private: bool,
    create_pr: bool,
    revision: str | None,
    message: str | None,
    license: str | None,  # noqa: A002 (the library's word)
    base_model: str | None,
    dry_run: bool,
    yes: bool,
    alpha: Alpha | None,
    as_json: bool,
) -> None:
    """Upload an adapter to the Hugging Face Hub in one commit, with a card, in the form that PEFT and serving engines load.

    ADAPTER is by default the newest in the catalogue, REPO your own repository of the same name. Files that the repository
    already has are not sent again. An existing README is kept, except for loratool's own part.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from loratool.library.push import push

    if merged and adapter is None:
        raise click.UsageError(
            "--merged needs the folder, or the catalogued name, of the model", click.get_current_context()
        )
    for value, option in (
        (repository, "REPO"),
        (revision, "--revision"),
        (base_model, "--base-model"),
        (license, "--license"),
    ):
        if value == "":
            raise click.BadParameter("it is empty", click.get_current_context(), param_hint=f"'{option}'")
    if not sys.stderr.isatty():
        disable_progress_bars()
    ask = sys.stdin.isatty() and sys.stderr.isatty() and not yes
    with ProgressBar() as progress:
        result = push(
            adapter,
            repository,
            merged=merged,
            files=files,
            all_files=all_files,
            private=private,
            create_pr=create_pr,
            revision=revision,
            message=message,
            license=license,
            base_model=base_model,
            alpha=alpha,
            dry_run=dry_run,
            confirm=_confirm if ask else None,
            progress=progress if merged else None,
            registry=registry,
        )
    if as_json:
        print_json(result.to_json())
        return
    _print_plan(result) if dry_run else _print_result(result)
    print_notes(result.notes)


def _confirm(question: str) -> bool:
    return click.confirm(question, err=True)


def _print_plan(result: PushResult) -> None:
    sent = [file for file in result.files if file.state != "same"]
    click.echo(f"Would push {shown(result.source)} to {shown(result.url)}: {counted(len(sent), 'file')} to send")
    click.echo()
    print_table(
        ["FILE", "SIZE", ""],
        [[file.path, size(file.size_bytes), file.state] for file in result.files],
        right=["SIZE"],
        give_way=["SIZE"],
    )
    click.echo("\nREADME.md:\n")
    for line in result.card.rstrip("\n").split("\n"):
        click.echo(shown(line.rstrip("\r")))


def _print_result(result: PushResult) -> None:
    if not result.sent:
        where = result.pull_request or result.url
        click.echo(f"Already there: {shown(result.source)} at {shown(where)}; nothing was sent")
        return
    sent = [file for file in result.files if file.state != "same"]
    click.echo(f"Pushed {click.style(shown(result.source), bold=True)} to {shown(result.url)}")
    print_facts(
        [
            ("commit", f"{(result.commit or '')[:12]} on {result.revision}" if result.pull_request is None else ""),
            ("pull request", result.pull_request or ""),
            ("repository", ("new, " if result.created else "") + ("private" if result.private else "public")),
            ("files", f"{counted(len(sent), 'file')}, {size(sum(file.size_bytes for file in sent))}"),
            ("next", "" if result.pull_request else _next(result)),
        ]
    )


def _next(result: PushResult) -> str:
    """Return the command with which other people get it."""
    name = result.repository.rpartition("/")[2]
    return f"loratool base add {name} {result.repository}" if result.merged else f"loratool pull {result.repository}"
