"""``loratool eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.options import PathType, alpha_option, device_option, example, json_option
from loratool.cli.rendering import ProgressBar, counted, print_json, print_notes, print_table, shown, shown_path

if TYPE_CHECKING:
    from loratool.library.evaluate import EvalResult
    from loratool.train.loss import Score


@click.command(
    "eval",
    **example(
        "loratool eval smollm2 --data my.jsonl\nloratool eval smollm2 --data examples/pirate.jsonl --adapter pirate"
    ),
)
@click.argument("model")
@click.option(
    "--data", required=True, type=PathType(), metavar="FILE", help="A JSONL file of samples, or a text (.txt)."
)
@click.option("--adapter", metavar="A", help="Measure the model also with this adapter beside it.")
@click.option("--plain", is_flag=True, help="Join prompt and completion as they are, without the chat template.")
@click.option(
    "--max-length",
    type=int,
    metavar="N",
    help="The most tokens of a sample, and the length of a text's windows; by default the model's context, but 2048 at most.",
)
@click.option(
    "--batch-size", type=int, default=4, show_default=True, metavar="N", help="Samples that are computed at once."
)
@device_option
@alpha_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    model: str,
    data: str,
    adapter: str | None,
    plain: bool,
    max_length: int | None,
    batch_size: int,
    device: str,
    alpha: float | None,
    as_json: bool,
) -> None:
    """Loss and perplexity of a model on your own text, with an adapter beside it or without.

    A line of FILE has "text"; or "prompt" and "completion", of which the completion counts; or "messages", of which what
    the assistant says counts. Prompt and completion stand in the model's chat template if it has one. A text file is
    cut into windows side by side. The loss is the mean of the tokens that count, in nats; on a CPU it is computed in fp32.
    """
    from loratool.library.evaluate import evaluate

    with ProgressBar(unit="samples") as progress:
        result = evaluate(
            model,
            data,
            adapter=adapter,
            max_length=max_length,
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
    click.echo(
        f"{click.style(shown_path(result.data), bold=True)}: {counted(result.samples, 'sample')}, "
        f"{counted(result.score.tokens, 'token')} scored\n"
    )
    model = shown(result.model)
    if result.adapter is None or result.without_adapter is None:
        rows = [_row(model, result.score)]
    else:
        gap = result.score.loss - result.without_adapter.loss
        rows = [
            _row(model, result.without_adapter),
            _row(f"{model} + {_adapter(result.adapter)}", result.score),
            ["difference", f"{gap:+.4f}", f"{result.score.perplexity - result.without_adapter.perplexity:+.2f}", ""],
        ]
    print_table(
        ["MODEL", "LOSS", "PERPLEXITY", "TOKENS/S"], rows, right=("LOSS", "PERPLEXITY", "TOKENS/S"), wide="MODEL"
    )


def _adapter(reference: str) -> str:
    """A catalogued adapter's reference, or the path of another: of its folder, where that is what PEFT calls by name."""
    path = Path(reference)
    if path.suffix not in {".safetensors", ".st"}:
        return reference
    return shown_path(path.parent if path.name == "adapter_model.safetensors" else path)


def _row(name: str, score: Score) -> list[str]:
    return [name, f"{score.loss:.4f}", f"{score.perplexity:.2f}", f"{score.tokens_per_second:,.0f}"]
