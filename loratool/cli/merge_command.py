"""``loratool merge``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.options import (
    Alpha,
    PathType,
    alpha_option,
    any_base_option,
    device_option,
    example,
    force_option,
    json_option,
)
from loratool.cli.plan_view import PlannedTensor, print_plan
from loratool.cli.preload_torch import preload_torch
from loratool.cli.rendering import (
    ProgressBar,
    counted,
    delivered,
    duration,
    near,
    print_facts,
    print_json,
    print_notes,
    shown,
    shown_path,
    size,
)
from loratool.errors import to_paste
from loratool.weights.storages import MAKINGS

if TYPE_CHECKING:
    from loratool.library.merges.result import MergeResult
    from loratool.library.merges.tokenizer_choice import TokenizerOf
    from loratool.merging.conversion_plan import Conversion


@click.command(
    "merge",
    **example(
        "loratool merge pirate.safetensors --into llama3-8b\n"
        "loratool merge pirate=0.7 terse=0.3 --into smollm2 --undo\n"
        "loratool merge dylora@rank=4 --into smollm2"
    ),
)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[@rank=B][=WEIGHT]...")
@click.option(
    "--into", metavar="BASE", help="A catalogued name, a folder, or a Hub id; by default the base they are tied to."
)
@click.option("--out", type=PathType(), metavar="DIR", help="The new folder; by default BASE-ADAPTER beside the base.")
@click.option("--in-place", is_flag=True, help="Change the base's own files; an undo file is always kept.")
@click.option(
    "--quantize",
    type=click.Choice(list(MAKINGS)),
    help="Dense base to 4-bit model: merge, then quantize. Choose it for the best quality in 4 bits.",
)
@click.option(
    "--base-as",
    type=click.Choice(list(MAKINGS)),
    help="Dense base to 4-bit model: quantize, then merge. Choose it for the result of merging into its 4-bit image.",
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Quantized base to dense model. Choose it for exactly what QLoRA trained, if 16 bits per weight fit.",
)
@click.option(
    "--calibrate",
    type=PathType(),
    metavar="FILE",
    help="Into 4 bits: keep more of the update, by a short text like those that the model will read (.jsonl or .txt, at most "
    "1,024 tokens are used). Runs the model once: needs its memory (4-bit weights stay packed) and 'loratool[train]'.",
)
@click.option("--untie", is_flag=True, help="Give a head that the base ties to its embedding its own tensor.")
@click.option("--undo", is_flag=True, help="Keep an undo file, to take the merge out without the base.")
@click.option("--dry-run", is_flag=True, help="Print the plan and check everything; write nothing.")
@click.option("--verbose", is_flag=True, help="List every tensor, and print the noise of the merge.")
@force_option
@any_base_option
@click.option("--again", is_flag=True, help="Merge an adapter again that is in the base already.")
@click.option("--allow-no-op", is_flag=True, help="Continue if a merge changes nothing or loses most of its update.")
@click.option(
    "--without-extras",
    is_flag=True,
    help="Leave out weights that were trained with an adapter but are in other files (heads, projectors).",
)
@click.option(
    "--tokenizer",
    type=click.Choice(["base", "adapter"]),
    help="Whose tokenizer and chat template; by default the adapter's if it trained embeddings or they differ.",
)
@device_option
@alpha_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    adapters: tuple[str, ...],
    into: str | None,
    out: str | None,
    in_place: bool,
    quantize: str | None,
    base_as: str | None,
    dequantize: bool,
    calibrate: str | None,
    undo: bool,
    dry_run: bool,
    verbose: bool,
    force: bool,
    any_base: bool,
    again: bool,
    allow_no_op: bool,
    without_extras: bool,
    tokenizer: TokenizerOf | None,
    untie: bool,
    device: str,
    alpha: Alpha | None,
    as_json: bool,
) -> None:
    """Merge adapters into the weights of a base model, computed in fp32, rounded once, streamed.

    An ADAPTER is a catalogued name (pirate or pirate@2), a PEFT folder or a safetensors file; WEIGHT multiplies it. A
    DyLoRA acts at its full rank, or at rank B.
    """
    if not dry_run:
        preload_torch()
    from loratool.library.merge import merge

    if in_place and out:
        raise click.UsageError("give --out or --in-place, not both")
    if sum((quantize is not None, base_as is not None, dequantize)) > 1:
        raise click.UsageError("give one of --quantize, --base-as and --dequantize")
    if in_place and (quantize or base_as or dequantize):
        raise click.UsageError("the storage of a base cannot be changed --in-place; give --out")
    specs = [parse_spec(word) for word in adapters]
    with ProgressBar() as progress:
        result = merge(
            specs,
            into,
            out=out,
            in_place=in_place,
            quantize=quantize,
            base_as=base_as,
            dequantize=dequantize,
            calibrate=calibrate,
            dry_run=dry_run,
            undo=undo,
            force=force,
            any_base=any_base,
            again=again,
            allow_no_op=allow_no_op,
            without_extras=without_extras,
            tokenizer=tokenizer,
            untie=untie,
            device=device,
            alpha=alpha,
            registry=registry,
            progress=progress,
        )
    if as_json:
        print_json(result.to_json())
        return
    if dry_run or verbose:
        _print_tensors(result, verbose=verbose)
    if dry_run:
        _print_plan(result, in_place=in_place)
    else:
        _print_result(result, in_place=in_place, verbose=verbose)
    print_notes(result.notes)


def parse_spec(word: str) -> tuple[str, float]:
    """Split ``name=0.5`` into adapter and weight; ``name``, ``name@rank=4`` or a path has weight 1.

    A path that exists is never split at an equals sign.
    """
    from loratool.library.places.user_path import exists
    from loratool.library.resolving.resolve import RANK_SIGN

    guess = re.fullmatch(r"([^=:*]+)[:*]([0-9]*\.?[0-9]+)", word)
    if guess and not exists(Path(word)):
        raise click.UsageError(f"{word!r} is not an adapter; a weight stands after '=': {guess[1]}={guess[2]}")
    name, separator, weight = word.rpartition("=")
    if not separator or exists(Path(word)) or f"{name}=".endswith(RANK_SIGN):
        return word, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not name or not math.isfinite(value):
        raise click.UsageError(f"{word!r} must be ADAPTER or ADAPTER=WEIGHT with a number for WEIGHT")
    return name, value


def _print_tensors(result: MergeResult, *, verbose: bool) -> None:
    becomes = {each.name: each.storage for each in _anew(result)}
    tensors = [
        PlannedTensor(
            target.name,
            (
                " + ".join(target.kinds),
                target.weight.storage + (f" to {becomes[target.name]}" if target.name in becomes else ""),
            ),
            (target.nbytes,),
        )
        for target in result.plan.targets
    ]
    print_plan(tensors, ["UPDATE", "STORAGE"], ["SIZE"], verbose=verbose)
    click.echo()


def _print_plan(result: MergeResult, *, in_place: bool) -> None:
    print_facts(
        [
            ("changes", _changed(result)),
            ("stored anew", _stored_anew(result)),
            ("tokenizer", shown(result.tokenizer.source or "")),
            ("in place" if in_place else "would write", shown_path(result.out)),
            ("takes about", duration(result.seconds)),
        ]
    )


def _print_result(result: MergeResult, *, in_place: bool, verbose: bool) -> None:
    names = [shown_path(name) if Path(name).is_absolute() else name for name in (m.adapter for m in result.adapters)]
    terms = [
        name if merged.weight == 1 else f"{merged.weight:g} x {name}"
        for name, merged in zip(names, result.adapters, strict=True)
    ]
    click.echo(
        f"Merged {click.style(shown(' + '.join(terms)), bold=True)} into {click.style(shown(result.base), bold=True)}"
    )
    out = shown_path(result.out)
    print_facts(
        [
            ("in place" if in_place else "written to", out),
            ("changed", _changed(result)),
            ("stored anew", _stored_anew(result)),
            ("tokenizer", shown(result.tokenizer.source or "")),
            ("delivered", delivered(result.delivery, verbose=verbose) if result.delivery else ""),
            ("time", duration(result.seconds)),
            ("undo", _undo(result)),
            ("check it", to_paste("loratool verify PATH", near(result.out), "")),
            (
                "take it out",
                to_paste(f"loratool unmerge PATH{' --in-place' if in_place else ''}", near(result.out), ""),
            ),
        ]
    )


def _undo(result: MergeResult) -> str:
    """Return the sizes of the undo file and of the adapters' copies beside it."""
    if result.undo_file is None:
        return ""
    copies = [file for file in result.undo_file.parent.iterdir() if file.suffix == ".st" and file != result.undo_file]
    whose = "the adapter's copy" if len(copies) == 1 else "the adapters' copies"
    return (
        f"{size(result.undo_file.stat().st_size)}, and {size(sum(each.stat().st_size for each in copies))} for {whose}"
    )


def _stored_anew(result: MergeResult) -> str:
    """Return the number of matrices that are stored differently than in the base, and the sizes of both models."""
    anew = _anew(result)
    if not anew:
        return ""
    sizes = f"{size(result.output_size_bytes)} instead of {size(result.plan.base.nbytes)}"
    return f"{counted(len(anew), 'tensor')} as {anew[0].storage}, {sizes}"


def _anew(result: MergeResult) -> list[Conversion]:
    """Return the matrices that are stored differently than in the base."""
    conversions = () if result.conversion is None else result.conversion.conversions
    return [each for each in conversions if each.storage != each.source.storage]


def _changed(result: MergeResult) -> str:
    changed = [target for target in result.plan.targets if target.name not in set(result.unchanged)]
    nbytes = sum(target.nbytes for target in changed)
    return f"{counted(len(changed), 'tensor')}, {size(nbytes)} of {size(result.plan.base.nbytes)}"
