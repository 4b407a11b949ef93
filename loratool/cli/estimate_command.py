"""``loratool estimate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.cli.options import example, json_option
from loratool.cli.rendering import (
    count,
    counted,
    print_facts,
    print_json,
    print_notes,
    shown,
    size,
    targets,
)
from loratool.cli.table import print_table
from loratool.training.options import METHODS, RANKS, method_with
from loratool.weights.storages import QUANTIZED_TO

if TYPE_CHECKING:
    from loratool.estimating.memory import Memory
    from loratool.library.estimate import EstimateResult


@click.command(
    "estimate",
    **example(
        "loratool estimate smollm2 --rank 16\nloratool estimate llama-65b --rank 64 --batch-size 1\n"
        "loratool estimate gpt3-175b --rank 4 --targets q_proj,v_proj"
    ),
)
@click.argument("base")
@click.option(
    "--method", type=click.Choice(list(METHODS)), default="lora", show_default=True, help="The method of training."
)
@click.option("--rank", type=int, default=8, show_default=True, metavar="R", help=f"The rank: {RANKS}.")
@click.option(
    "--initial-rank",
    type=int,
    metavar="R",
    help=f"{method_with('initial_rank').title}'s rank at the start; by default 1.25 times --rank.",
)
@click.option("--targets", metavar="T", help="q_proj,v_proj, a pattern, or all-linear (the default).")
@click.option("--batch-size", type=int, default=4, show_default=True, metavar="N", help="Rows computed at once.")
@click.option("--max-length", "--length", type=int, metavar="N", help="Tokens in a row; by default 512.")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adamw-8bit", "adamw-paged", "sgd"]),
    default="adamw",
    show_default=True,
    help="The optimizer, which decides the memory for moments.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp32"]),
    default="bf16",
    show_default=True,
    help="The type of the weights and of the arithmetic.",
)
@click.option(
    "--adapter-dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="The type of the adapter in training and in its file.",
)
@click.option(
    "--attention",
    type=click.Choice(["sdpa", "eager"]),
    default="sdpa",
    show_default=True,
    help="The attention code. eager keeps all scores in memory.",
)
@json_option
@click.pass_obj
def command(
    registry: str | None,
    base: str,
    method: str,
    rank: int,
    initial_rank: int | None,
    targets: str | None,
    batch_size: int,
    max_length: int | None,
    optimizer: str,
    precision: str,
    adapter_dtype: str,
    attention: str,
    as_json: bool,
) -> None:
    """Estimate the parameters, the file size and the memory of training an adapter.

    For comparison, the memory of full fine-tuning and of training on a base in NF4 (QLoRA) is shown too. BASE is a
    catalogued name, a folder, a config.json, a Hub id, or a known shape: gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3-175b,
    llama-7b, llama-13b, llama-33b, llama-65b, llama3-8b, llama3-70b, llama3-405b, mistral-7b. Only a configuration is loaded
    or downloaded.
    """
    from loratool.library.estimate import estimate

    result = estimate(
        base,
        method=method,
        rank=rank,
        initial_rank=initial_rank,
        targets=targets,
        batch_size=batch_size,
        max_length=max_length,
        optimizer=optimizer,
        precision=precision,
        adapter_dtype=adapter_dtype,
        attention=attention,
        registry=registry,
    )
    if as_json:
        print_json(result.to_json())
        return
    _print_result(result)
    print_notes(result.notes)


def _print_result(result: EstimateResult) -> None:
    fewer = result.parameters / result.trainable_parameters
    begins = f", beginning with {result.initial_rank}" if result.initial_rank != result.rank else ""
    method = METHODS[result.method].title
    click.echo(f"{click.style(shown(result.model), bold=True)}: {count(result.parameters)} parameters\n")
    print_facts(
        [
            ("adapter", f"{method} of rank {result.rank}{begins}, on {counted(result.adapted_modules, 'module')}"),
            ("targets", targets(result.target_modules)),
            ("trainable", f"{result.trainable_parameters:,} parameters, {fewer:,.0f} times fewer than in full"),
            ("adapter file", f"{size(result.adapter_file)} in {result.adapter_dtype}"),
            (
                "a step",
                f"{result.batch_size:,} x {result.length:,} tokens, {result.precision}, {result.optimizer}, "
                f"{result.attention} attention",
            ),
        ]
    )
    names = ["MEMORY", "FULL", method.upper(), f"{QUANTIZED_TO.upper()} + {method.upper()}"]
    memories = [way.memory for way in result.ways]
    checkpointed = [way.checkpointed for way in result.ways]
    rows = [
        _row("weights", memories, "weights"),
        _row("gradients", memories, "gradients"),
        _row("optimizer", memories, "optimizer"),
        _row("activations", memories, "activations"),
        _row("together", memories, "total"),
        _row("activations, gradient checkpointing", checkpointed, "activations"),
        _row("together, gradient checkpointing", checkpointed, "total"),
    ]
    click.echo()
    print_table(names, rows, right=names[1:])


def _row(name: str, memories: list[Memory], part: str) -> list[str]:
    return [name, *(size(getattr(memory, part)) for memory in memories)]
