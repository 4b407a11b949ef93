"""``loratool combine``."""

from __future__ import annotations

import shlex

import click

from loratool.cli.merge_command import parse_spec
from loratool.cli.options import Alpha, PathType, alpha_option, any_base_option, example, force_option, json_option
from loratool.cli.rendering import (
    ProgressBar,
    catalogued,
    percent,
    print_facts,
    print_json,
    print_notes,
    shown,
    shown_path,
    size,
)
from loratool.ranks.methods import METHODS, Method


@click.command(
    "combine",
    **example(
        "loratool combine pirate=0.7 terse=0.3 --method cat --out both.safetensors\n"
        "loratool combine pirate terse --method ties --density 0.5 --out both.safetensors"
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[@rank=B][=WEIGHT]...")
@click.option(
    "--method",
    required=True,
    type=click.Choice(METHODS),
    help="cat: the exact weighted sum; svd: its best approximation of one rank; the others combine the factors.",
)
@click.option(
    "--density", type=float, metavar="D", help="The share of numbers that ties, dare and magnitude-prune keep."
)
@click.option("--rank", type=int, metavar="R", help="The rank of svd; by default the adapters' largest.")
@click.option("--seed", type=int, metavar="N", help="The seed of dare; by default derived from the adapters.")
@click.option("--out", required=True, type=PathType(), metavar="FILE", help="A file (.safetensors, .st) or a folder.")
@click.option("--name", metavar="N", help="Its name in the catalogue; by default the file's name.")
@force_option
@any_base_option
@alpha_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    adapters: tuple[str, ...],
    method: Method,
    density: float | None,
    rank: int | None,
    seed: int | None,
    out: str,
    name: str | None,
    force: bool,
    any_base: bool,
    alpha: Alpha | None,
    as_json: bool,
) -> None:
    """Combine several adapters into one, with weights and with the results of PEFT's add_weighted_adapter.

    Their ranks, alphas and target modules may differ. WEIGHT multiplies an adapter's update and may be negative. A DyLoRA
    is combined at its full rank, or at rank B with ADAPTER@rank=B.
    """
    from loratool.library.combine import combine

    with ProgressBar() as progress:
        result = combine(
            [parse_spec(word) for word in adapters],
            method,
            out=out,
            density=density,
            rank=rank,
            seed=seed,
            name=name,
            alpha=alpha,
            force=force,
            any_base=any_base,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    record = result.record
    terms = [parent if weight == 1 else f"{weight:g} x {parent}" for parent, weight in result.parents]
    click.echo(f"Combined {click.style(shown(' + '.join(terms)), bold=True)} by {method}")
    print_facts(
        [
            ("written to", shown_path(result.out)),
            ("catalogued", catalogued(record)),
            ("rank", str(record.rank)),
            ("lost", "" if result.error is None else f"{percent(result.error)} of the exact sum (Frobenius norm)"),
            ("seed", "" if result.recipe.seed is None else str(result.recipe.seed)),
            ("size", f"{size(record.size_bytes)} {record.dtype}"),
            (
                "next",
                f"loratool merge {shlex.quote(record.name)} --into {record.base}"
                if record.is_catalogued and record.base
                else "",
            ),
        ]
    )
    print_notes(result.notes)
