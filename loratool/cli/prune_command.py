"""``loratool prune``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from loratool.cli.options import Alpha, PathType, alpha_option, example, force_option, json_option
from loratool.cli.rendering import catalogued, counted, print_facts, print_json, print_notes, shown, shown_path, size

if TYPE_CHECKING:
    from loratool.library.prune import PruneResult


@click.command(
    "prune",
    **example(
        "loratool prune adalora --budget 144\nloratool prune adalora --average-rank 4 --as lora --out small.safetensors"
    ),
)
@click.argument("adapter")
@click.option("--budget", type=int, metavar="TOTAL", help="The number of ranks to keep in all modules together.")
@click.option(
    "--average-rank", type=float, metavar="R", help="Instead of --budget: the average number to keep per module."
)
@click.option("--threshold", type=float, metavar="T", help="Instead of --budget: keep ranks that score above T.")
@click.option(
    "--as",
    "as_",
    type=click.Choice(["adalora", "lora"]),
    default="adalora",
    show_default=True,
    help="The kind of the result. In a LoRA, E is multiplied into the factors.",
)
@click.option("--out", type=PathType(), metavar="FILE", help="A file or folder; by default ADAPTER-bTOTAL beside it.")
@click.option("--name", metavar="N", help="Its name in the catalogue; by default the file's name.")
@alpha_option
@force_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    adapter: str,
    budget: int | None,
    average_rank: float | None,
    threshold: float | None,
    as_: Literal["adalora", "lora"],
    out: str | None,
    name: str | None,
    alpha: Alpha | None,
    force: bool,
    as_json: bool,
) -> None:
    """Drop the least important ranks of an AdaLoRA.

    The ranks of all modules are compared by the importance scores of the training if the file has them, else by the singular
    values |E|.
    """
    from loratool.library.prune import prune

    if sum(value is not None for value in (budget, average_rank, threshold)) != 1:
        raise click.UsageError("give one of --budget, --average-rank and --threshold")
    result = prune(
        adapter,
        budget=budget,
        average_rank=average_rank,
        threshold=threshold,
        as_=as_,
        out=out,
        name=name,
        alpha=alpha,
        force=force,
        registry=registry,
    )
    if as_json:
        print_json(result.to_json())
        return
    _print_result(result)
    print_notes(result.notes)


def _print_result(result: PruneResult) -> None:
    record, gone = result.record, sum(rank == 0 for rank in result.ranks.values())
    click.echo(f"Pruned {click.style(shown(result.parent), bold=True)} by its {result.criterion}")
    print_facts(
        [
            ("written to", shown_path(result.out)),
            ("catalogued", f"{catalogued(record)}, {record.kind}"),
            ("kept", f"{result.total:,} of {counted(result.before, 'rank')}"),
            ("ranks", f"{min(result.ranks.values())} to {max(result.ranks.values())}"),
            ("rank 0", counted(gone, "module") if gone else ""),
            ("size", f"{size(record.size_bytes)} {record.dtype}"),
        ]
    )
