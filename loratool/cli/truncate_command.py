"""``loratool truncate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import Alpha, PathType, alpha_option, example, force_option, json_option
from loratool.cli.rendering import (
    ProgressBar,
    catalogued,
    percent,
    print_facts,
    print_json,
    print_notes,
    ranks,
    shown,
    shown_path,
    size,
)
from loratool.cli.table import print_table
from loratool.formats.scaling_law import LAWS

if TYPE_CHECKING:
    from loratool.library.truncate import TruncateResult


def _parse_ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse ``8``, or several ranks such as ``1,2,4,8``."""
    if value is None:
        return None
    words = [word.strip() for word in value.split(",")]
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise click.BadParameter(f"{value!r} is not a rank; write 8, or several as 1,2,4,8", ctx, param)
    return tuple(map(int, words))


@click.command(
    "truncate",
    **example(
        "loratool truncate dylora.st --rank 16\n"
        "loratool truncate dylora --rank 1,2,4,8\n"
        "loratool truncate pirate --energy 0.95 --out small.safetensors"
    ),
)
@click.argument("adapter")
@click.option("--rank", callback=_parse_ranks, metavar="R[,R...]", help="The new rank; several give one file each.")
@click.option("--energy", type=float, metavar="E", help="Instead of --rank: the share of each module's energy to keep.")
@click.option(
    "--error",
    type=float,
    metavar="X",
    help="Instead of --rank: the share of its Frobenius norm that a module may lose.",
)
@click.option("--svd", is_flag=True, help="Cut a DyLoRA by its best approximation instead of its leading components.")
@click.option(
    "--scaling",
    type=click.Choice(LAWS),
    help="Cut to the leading components with this scaling law instead of the file's.",
)
@click.option("--out", type=PathType(), metavar="FILE", help="A file or folder; by default ADAPTER-rR beside it.")
@click.option("--name", metavar="N", help="Its name in the catalogue; by default the file's name.")
@alpha_option
@force_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    adapter: str,
    rank: tuple[int, ...] | None,
    energy: float | None,
    error: float | None,
    svd: bool,
    scaling: str | None,
    out: str | None,
    name: str | None,
    alpha: Alpha | None,
    force: bool,
    as_json: bool,
) -> None:
    """Cut an adapter to a lower rank.

    A DyLoRA is cut to its leading components, which is exact at any rank. For any other adapter, each module gets its best
    approximation, computed from the factors alone.
    """
    from loratool.library.truncate import truncate

    if sum(value is not None for value in (rank, energy, error)) != 1:
        raise click.UsageError("give one of --rank, --energy and --error")
    with ProgressBar() as progress:
        results = truncate(
            adapter,
            rank=rank if rank is None or len(rank) > 1 else rank[0],
            energy=energy,
            error=error,
            svd=svd,
            scaling=scaling,
            out=out,
            name=name,
            alpha=alpha,
            force=force,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json([result.to_json() for result in results])
        return
    _print_results(results)
    print_notes(dict.fromkeys(note for result in results for note in result.notes))


def _print_results(results: tuple[TruncateResult, ...]) -> None:
    first = results[0]
    parent = click.style(shown(first.parent), bold=True)
    how = f"leading components, {first.scaling}'s scaling" if first.scaling else "best approximation"
    click.echo(f"Cut {parent} by its {how}")
    if len(results) > 1:
        rows = [
            [
                _rank(result),
                f"{result.record.alpha:g}",
                "-" if result.error is None else percent(result.error),
                size(result.record.size_bytes),
                result.record.reference,
                shown_path(result.out),
            ]
            for result in results
        ]
        columns = ["RANK", "ALPHA", "ERROR", "SIZE", "NAME", "FILE"]
        print_table(columns, rows, right=("RANK", "ALPHA", "ERROR", "SIZE"), give_way=("ALPHA", "SIZE", "ERROR"))
        return
    print_facts(
        [
            ("written to", shown_path(first.out)),
            ("catalogued", catalogued(first.record)),
            ("rank", _rank(first)),
            ("alpha", f"{first.record.alpha:g}"),
            ("error", "" if first.error is None else f"{percent(first.error)} of the update's Frobenius norm"),
            ("size", f"{size(first.record.size_bytes)} {first.record.dtype}"),
        ]
    )


def _rank(result: TruncateResult) -> str:
    """Format the rank, or the range if modules differ: ``2 to 7``."""
    by_module = set((result.record.ranks or {}).values())
    if len(by_module) > 1:
        return f"{min(by_module)} to {max(by_module)}"
    return ranks(result.record.kind, result.record.rank)
