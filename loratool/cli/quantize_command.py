"""``loratool quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loratool.checkpoint.dtypes import DENSE, DTYPES
from loratool.cli.options import PathType, any_base_option, example, force_option, json_option, verbose_option
from loratool.cli.plan_view import PlannedTensor, print_plan
from loratool.cli.rendering import (
    ProgressBar,
    counted,
    duration,
    print_facts,
    print_json,
    print_notes,
    shown,
    shown_path,
    size,
)

if TYPE_CHECKING:
    from loratool.library.quantize import QuantizeResult


@click.command(
    "quantize", **example("loratool quantize smollm2\nloratool quantize models/llama3-8b --out llama3-8b-nf4")
)
@click.argument("base")
@click.option("--out", type=PathType(), metavar="DIR", help="The new folder; by default BASE-nf4 beside the base.")
@click.option("--name", metavar="N", help="Its name in the catalogue; by default BASE-nf4 if BASE is catalogued.")
@click.option(
    "--blocksize",
    type=int,
    default=64,
    show_default=True,
    metavar="B",
    help="The number of elements that share a scale.",
)
@click.option(
    "--double-quant/--no-double-quant", default=True, show_default=True, help="Also store the scales in 8 bits."
)
@click.option(
    "--compute-dtype",
    type=click.Choice([DTYPES[name].title for name in DENSE]),
    help="The type in which the loaded model computes; by default the base's.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and check everything; write nothing.")
@verbose_option
@force_option
@any_base_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    base: str,
    out: str | None,
    name: str | None,
    blocksize: int,
    double_quant: bool,
    compute_dtype: str | None,
    dry_run: bool,
    verbose: bool,
    force: bool,
    any_base: bool,
    as_json: bool,
) -> None:
    """Quantize the linear modules of a full model to NF4, with the same bits as bitsandbytes.

    transformers loads the result as a 4-bit model. BASE is a catalogued name, a folder, or a Hub id. It is streamed, not
    loaded whole.
    """
    from loratool.library.quantize import quantize

    with ProgressBar() as progress:
        result = quantize(
            base,
            out=out,
            name=name,
            blocksize=blocksize,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            dry_run=dry_run,
            force=force,
            any_base=any_base,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    if dry_run or verbose:
        _print_tensors(result, verbose=verbose)
    if dry_run:
        _print_plan(result)
    else:
        _print_result(result)
    print_notes(result.notes)


def _print_tensors(result: QuantizeResult, *, verbose: bool) -> None:
    tensors = [
        PlannedTensor(
            each.name, (each.source.storage, each.storage), (each.nbytes, sum(new.nbytes for new in each.outcome))
        )
        for each in result.plan.conversions
    ]
    print_plan(tensors, ["STORAGE", "TO"], ["SIZE", "THEN"], verbose=verbose)
    click.echo()


def _print_plan(result: QuantizeResult) -> None:
    print_facts([("size", _sizes(result)), ("would write", shown_path(result.out))])


def _print_result(result: QuantizeResult) -> None:
    click.echo(f"Quantized {click.style(shown(result.base), bold=True)}")
    print_facts(
        [
            ("written to", shown_path(result.out)),
            (f"in {result.title}", counted(len(result.plan.conversions), "tensor")),
            ("size", _sizes(result)),
            ("time", duration(result.seconds)),
            ("catalogued", result.name or ""),
        ]
    )


def _sizes(result: QuantizeResult) -> str:
    return f"{size(result.plan.layout.nbytes)} instead of {size(result.plan.base.nbytes)}"
