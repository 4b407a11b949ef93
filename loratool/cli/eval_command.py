"""``loratool eval``."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Final

import click

from loratool.cli.options import Alpha, PathType, alpha_option, device_option, example, json_option
from loratool.cli.rendering import (
    ProgressBar,
    bar,
    counted,
    print_json,
    print_notes,
    shown,
    shown_adapter,
    shown_path,
)
from loratool.cli.table import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loratool.library.evaluate import EvalResult, RankScore
    from loratool.running.loss import Score

BAR_CELLS: Final = 40
FIGURES_CELLS: Final = 30
"""The width of the columns before the bars."""


def _parse_ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value) is None:
        raise click.BadParameter(f"{value!r} must be whole numbers separated by commas: 1,2,4,8", ctx, param)
    return tuple(map(int, value.split(",")))


@click.command(
    "eval",
    **example(
        "loratool eval smollm2 --data my.jsonl\nloratool eval smollm2 --data my.jsonl --adapter pirate --ranks 1,2,4"
    ),
)
@click.argument("model")
@click.option(
    "--data",
    required=True,
    type=PathType(),
    metavar="FILE",
    help="Samples: JSONL, JSON, CSV, Parquet, a data set on the Hub (owner/name:split), or a text (.txt).",
)
@click.option("--adapter", metavar="A", help="Also measure the model with this adapter.")
@click.option(
    "--ranks", callback=_parse_ranks, metavar="R,R,...", help="Also measure the adapter cut to each of these ranks."
)
@click.option("--plot", type=PathType(), metavar="FILE", help="Draw the loss by rank: a .png, .svg or .pdf.")
@click.option("--force", is_flag=True, help="Replace a picture that loratool drew.")
@click.option("--plain", is_flag=True, help="Join prompt and completion as they are, without the chat template.")
@click.option(
    "--max-length",
    type=int,
    metavar="N",
    help="Maximum tokens in a sample, or in a window of a text; by default the model's context, at most 2048.",
)
@click.option("--truncate", is_flag=True, help="Cut longer samples instead of refusing them.")
@click.option("--batch-size", type=int, default=4, show_default=True, metavar="N", help="Samples computed at once.")
@device_option
@alpha_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    model: str,
    data: str,
    adapter: str | None,
    ranks: tuple[int, ...] | None,
    plot: str | None,
    force: bool,
    plain: bool,
    max_length: int | None,
    truncate: bool,
    batch_size: int,
    device: str,
    alpha: Alpha | None,
    as_json: bool,
) -> None:
    """Measure loss and perplexity of a model on your own text, alone or with an adapter, also at lower ranks.

    A line or row of FILE has "text", or "prompt" and "completion", or "messages". All of a text counts towards the loss; of
    the others, only the completion or the assistant's turns. The model's chat template is used if it has one. A text file is
    cut into consecutive windows. The loss is the mean over the tokens that count, in nats. On a CPU it is computed in fp32.

    At a lower rank, a DyLoRA is its first components, and any other LoRA is its best approximation of that rank.
    """
    from loratool.library.evaluate import evaluate

    with ProgressBar(unit="samples") as progress:
        result = evaluate(
            model,
            data,
            adapter=adapter,
            ranks=ranks,
            plot=plot,
            force=force,
            max_length=max_length,
            truncate=truncate,
            batch_size=batch_size,
            plain=plain,
            device=device,
            alpha=alpha,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    _print_result(result)
    print_notes(result.notes)


def _print_result(result: EvalResult) -> None:
    title = (
        f"{click.style(shown_path(result.data), bold=True)}: {counted(result.samples, 'sample')}"
        f"{f' ({result.truncated:,} of them cut)' if result.truncated else ''}, {counted(result.score.tokens, 'token')} scored"
    )
    if result.ranks and result.adapter is not None and result.without_adapter is not None:
        click.echo(f"{title} by {shown(result.model)} + {shown_adapter(result.adapter)}\n")
        _print_ranks(result.ranks, result.without_adapter)
    else:
        click.echo(f"{title}\n")
        _print_scores(result)
    if result.plot is not None:
        click.echo(f"\nThe picture is {shown_path(result.plot)}")


def _print_scores(result: EvalResult) -> None:
    model = shown(result.model)
    if result.adapter is None or result.without_adapter is None:
        rows = [_row(model, result.score)]
    else:
        gap = result.score.loss - result.without_adapter.loss
        rows = [
            _row(model, result.without_adapter),
            _row(f"{model} + {shown_adapter(result.adapter)}", result.score),
            ["difference", f"{gap:+.4f}", f"{result.score.perplexity - result.without_adapter.perplexity:+.2f}", ""],
        ]
    print_table(
        ["MODEL", "LOSS", "PERPLEXITY", "TOKENS/S"],
        rows,
        right=("LOSS", "PERPLEXITY", "TOKENS/S"),
        give_way=("TOKENS/S",),
    )


def _print_ranks(ranks: Sequence[RankScore], alone: Score) -> None:
    """Print a row for the model alone and one for each rank, with the loss as a bar from 0."""
    scores = [("none", alone), *((str(each.rank), each.score) for each in ranks)]
    largest = max(score.loss for _, score in scores) or 1
    cells = max(8, min(BAR_CELLS, shutil.get_terminal_size().columns - FIGURES_CELLS))
    rows = [
        [name, f"{score.loss:.4f}", f"{score.perplexity:.2f}", bar(score.loss / largest, cells)]
        for name, score in scores
    ]
    print_table(["RANK", "LOSS", "PERPLEXITY", ""], rows, right=("RANK", "LOSS", "PERPLEXITY"))


def _row(name: str, score: Score) -> list[str]:
    return [name, f"{score.loss:.4f}", f"{score.perplexity:.2f}", f"{score.tokens_per_second:,.0f}"]
