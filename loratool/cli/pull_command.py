"""``loratool pull``."""

from __future__ import annotations

import click

from loratool.cli.options import Alpha, alpha_option, any_base_option, example, json_option
from loratool.cli.rendering import ProgressBar, print_facts, print_json, print_notes, ranks, size, targets

EXAMPLES = """\
loratool pull someone/pirate
loratool pull someone/pirate@v2 --name pirate --base smollm2
loratool pull someone/adapters/pirate
loratool pull someone/pirate --update"""


@click.command("pull", **example(EXAMPLES))
@click.argument("repo")
@click.option("--name", metavar="N", help="Its name in the catalogue; by default the repository's.")
@click.option("--path", metavar="PATH", help="The folder or file inside the repository.")
@click.option(
    "--base",
    metavar="BASE",
    help="Its base: a catalogued name, a folder (which is then catalogued), or a Hub id.",
)
@any_base_option
@alpha_option
@click.option("--update", is_flag=True, help="Look for changes on the branch; a change becomes the next version.")
@json_option
@click.pass_obj
def command(
    registry: str | None,
    repo: str,
    name: str | None,
    path: str | None,
    base: str | None,
    any_base: bool,
    alpha: Alpha | None,
    update: bool,
    as_json: bool,
) -> None:
    """Download an adapter from the Hugging Face Hub into the catalogue.

    REPO is owner/name or owner/name@revision, also with a folder or file inside: owner/name/path. Every file is checked
    against the hash that the Hub lists. Pulling again uses no network, unless --update looks for a newer version.
    """
    from loratool.library.pull import pull

    with ProgressBar() as progress:
        result = pull(
            repo,
            name=name,
            path=path,
            base=base,
            any_base=any_base,
            alpha=alpha,
            update=update,
            registry=registry,
            progress=progress,
        )
    record = result.record
    if as_json:
        print_json(result.to_json())
        return
    said = "Pulled" if result.new else "Already there:"
    click.echo(f"{said} {click.style(record.reference, bold=True)}")
    inside = f"/{result.path_in_repo}" if result.path_in_repo else ""
    print_facts(
        [
            ("from", f"{result.repo}{inside}@{result.revision[:12]}"),
            ("kind", ", ".join([record.kind, *_numbers(record.kind, record.rank, record.alpha)])),
            ("targets", targets(record.target_modules)),
            ("base", record.base or ""),
            ("size", f"{size(record.size_bytes)} {record.dtype}"),
            ("sha256", record.sha256[:16] + "…"),
            ("next", f"loratool merge {record.name} --into {record.base}" if record.base and result.new else ""),
            ("next", "" if result.new or update else f"loratool pull {result.repo}{inside} --update"),
        ]
    )
    print_notes(result.notes)


def _numbers(kind: str, rank: int | None, alpha: float | None) -> list[str]:
    return [
        *([] if rank is None else [f"rank {ranks(kind, rank)}"]),
        *([] if alpha is None else [f"alpha {alpha:g}"]),
    ]
