"""``loratool train``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import click

from loratool.cli.options import ExampleCommand, PathType, device_option, example, json_option
from loratool.cli.rendering import (
    counted,
    duration,
    near,
    print_facts,
    print_json,
    print_notes,
    ranks,
    shown,
    shown_path,
    size,
    targets,
)
from loratool.cli.training_bar import TrainingBar
from loratool.errors import to_paste
from loratool.formats.scaling_law import LAWS
from loratool.training.options import METHODS, RANKS, method_with

if TYPE_CHECKING:
    from loratool.library.train import TrainResult
    from registry import AdapterRecord

EXAMPLE: Final = "loratool train --base smollm2 --data examples/pirate.jsonl --name pirate"
EXAMPLES: Final = f"""\
{EXAMPLE}
loratool train --base smollm2 --data my.jsonl --name mine --method dylora --rank 16 --epochs 3
loratool train --base llama3-8b --data my.jsonl --name mine --quantize nf4 --pack
loratool train --name pirate --resume"""

SECTIONS: Final = {
    "What": ("base", "data", "name", "out", "resume", "force", "registry"),
    "Adapter": ("method", "rank", "alpha", "targets", "dropout", "rslora", "initialisation", "quantize"),
    method_with("least_rank").title: ("least_rank", "distribution", "geometric_p", "update", "scaling_law"),
    method_with("initial_rank").title: (
        "initial_rank",
        "initial_steps",
        "final_steps",
        "allocation_steps",
        "orthogonality",
        "beta1",
        "beta2",
    ),
    "How long, and how": (
        "steps",
        "epochs",
        "batch_size",
        "accumulate",
        "lr",
        "schedule",
        "warmup",
        "weight_decay",
        "clip",
        "seed",
    ),
    "Samples": ("max_length", "truncate", "plain", "pack", "validation", "eval_every", "keep"),
    "Computing": ("device", "precision", "gradient_checkpointing", "save_every", "as_json", "help"),
}
"""Every option, under the headings of the help."""


class TrainCommand(ExampleCommand):
    """A command whose help groups the options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {
            str(parameter.name): record
            for parameter in self.get_params(ctx)
            if (record := parameter.get_help_record(ctx))
        }
        for heading, names in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([records[name] for name in names if name in records])


@click.command("train", **example(EXAMPLES) | {"cls": TrainCommand})
@click.option("--base", metavar="B", help="The model: a catalogued name, a folder or a Hub id.")
@click.option(
    "--data",
    type=PathType(),
    metavar="FILE",
    help="Samples: JSONL, JSON, CSV, Parquet, a data set on the Hub (owner/name:split), or a text (.txt).",
)
@click.option("--name", metavar="N", help="The adapter's name in the catalogue.")
@click.option("--out", type=PathType(), metavar="FILE", help="A file or folder; by default N.safetensors.")
@click.option("--resume", is_flag=True, help="Continue the run N from its last saved state.")
@click.option("--force", is_flag=True, help="Replace an unfinished run and its outputs; make the next version of N.")
@click.option("--method", type=click.Choice(list(METHODS)), help="By default lora.")
@click.option("--rank", type=int, metavar="R", help=f"The rank: {RANKS}. By default 8.")
@click.option("--alpha", type=float, metavar="A", help="lora_alpha; by default twice the rank.")
@click.option("--targets", metavar="T", help="q_proj,v_proj, a pattern, or all-linear (the default).")
@click.option("--dropout", type=float, metavar="P", help="The share of an adapter's inputs to drop in a step.")
@click.option("--rslora", is_flag=True, default=None, help="Scale by alpha / sqrt(rank).")
@click.option(
    "--initialisation", type=click.Choice(["kaiming", "gaussian"]), help="How A is initialized; B starts at zero."
)
@click.option("--quantize", type=click.Choice(["nf4"]), help="QLoRA: keep the base in 4 bits during training.")
@click.option("--least-rank", type=int, metavar="R", help="The smallest rank to train; by default 1.")
@click.option("--distribution", type=click.Choice(["uniform", "geometric"]), help="How a step's rank is drawn.")
@click.option(
    "--geometric-p", type=float, metavar="P", help="The parameter of the geometric distribution; by default 0.15."
)
@click.option(
    "--update", type=click.Choice(["leading", "frozen"]), help="Train all of a rank's components, or only its last."
)
@click.option("--scaling-law", type=click.Choice(LAWS), help="How rank b is scaled; by default alpha / b.")
@click.option(
    "--initial-rank", type=int, metavar="R", help="Each module's rank at the start; by default 1.25 times the rank."
)
@click.option("--initial-steps", type=int, metavar="N", help="Steps before pruning; by default a tenth of all.")
@click.option("--final-steps", type=int, metavar="N", help="Steps after pruning; by default three tenths of all.")
@click.option(
    "--allocation-steps", type=int, metavar="N", help="Steps between prunings; by default a hundredth of all."
)
@click.option(
    "--orthogonality", type=float, metavar="X", help="The weight of the orthogonality penalty; by default 0.5."
)
@click.option("--beta1", type=float, metavar="X", help="The decay of the average of sensitivity; by default 0.85.")
@click.option("--beta2", type=float, metavar="X", help="The decay of the average of its uncertainty; by default 0.85.")
@click.option("--steps", type=int, metavar="N", help="The number of optimizer steps.")
@click.option("--epochs", type=int, metavar="E", help="Instead of --steps: passes over the samples.")
@click.option(
    "--batch-size",
    type=int,
    metavar="N",
    help="Samples in a step, over all processes; by default 4, or 16 if there are many samples.",
)
@click.option("--accumulate", type=int, metavar="N", help="Passes into which a step is split, to save memory.")
@click.option("--lr", type=float, metavar="X", help="The largest learning rate; by default 0.001.")
@click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), help="By default cosine.")
@click.option(
    "--warmup", type=int, metavar="N", help="Steps during which the learning rate rises; by default a tenth of all."
)
@click.option("--weight-decay", type=float, metavar="X", help="AdamW's; by default 0.")
@click.option(
    "--clip", type=float, metavar="X", help="The largest norm of the gradients; by default 1; 0 turns clipping off."
)
@click.option("--seed", type=int, metavar="S", help="The random seed; by default 0.")
@click.option("--max-length", type=int, metavar="N", help="Maximum tokens in a sample; by default the model's context.")
@click.option("--truncate", is_flag=True, default=None, help="Cut longer samples instead of refusing them.")
@click.option("--plain", is_flag=True, default=None, help="Join prompt and completion without the chat template.")
@click.option(
    "--pack", is_flag=True, default=None, help="Pack several samples into a row. They do not see one another."
)
@click.option(
    "--validation", type=int, metavar="N", help="Samples to hold out; by default a tenth, or none if there are few."
)
@click.option("--eval-every", type=int, metavar="N", help="Steps between evaluations; by default a sixth of all.")
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    help="Which parameters to keep; by default the best on held-out samples.",
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="By default bf16 on CUDA and fp32 on a CPU.")
@click.option(
    "--gradient-checkpointing",
    is_flag=True,
    default=None,
    help="Recompute activations to save memory. Takes more time.",
)
@click.option(
    "--save-every", type=click.IntRange(min=1), metavar="N", help="Save a state every N steps instead of every minute."
)
@device_option
@json_option
@click.pass_obj
def command(
    registry: str | None,
    /,
    base: str | None,
    data: str | None,
    name: str | None,
    out: str | None,
    resume: bool,
    force: bool,
    save_every: int | None,
    device: str,
    as_json: bool,
    **choices: Any,
) -> None:
    """Train an adapter on your own samples, and catalogue it with its base, its recipe and its loss.

    The samples are those of 'loratool eval': lines with "text", "prompt" and "completion", or "messages". The defaults suit
    50 to 10,000 samples. The state of the run is saved every minute and on Ctrl-C, and --resume continues from it. Several
    processes, launched with 'torchrun --nproc_per_node 2 -m loratool train ...' or accelerate, share the samples of each
    step.
    """
    _refuse_missing({"--base": base, "--data": data, "--name": name}, resume=resume, registry=registry)
    from loratool.library.train import TrainingStopped, train
    from loratool.training.processes import is_first

    ctx = click.get_current_context()
    is_default = ctx.get_parameter_source("device") is click.core.ParameterSource.DEFAULT
    try:
        with TrainingBar() if is_first() else nullcontext() as progress:
            result = train(
                base,
                data,
                name=str(name),
                out=out,
                resume=resume,
                force=force,
                save_every=save_every,
                device=None if is_default else device,
                registry=registry,
                progress=progress,
                **choices,
            )
    except TrainingStopped as stopped:
        if is_first():
            click.echo(str(stopped), err=True)
        ctx.exit(stopped.status)
    if not is_first():
        return
    if as_json:
        print_json(result.to_json())
        return
    _print_result(result)
    print_notes(result.notes)


def _refuse_missing(options: dict[str, str | None], *, resume: bool, registry: str | None) -> None:
    """Raise UsageError for missing options, with an example that uses the user's own base if there is one."""
    needed = {"--name"} if resume else set(options)
    missing = [option for option, value in options.items() if option in needed and not value]
    if not missing:
        return
    says = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
    are = "are" if len(missing) > 1 else "is"
    if resume:
        raise click.UsageError(f"{says} {are} missing; such as: loratool train --name pirate --resume")
    bases = _bases(registry)
    known = f"\nBases in the catalogue: {', '.join(map(shown, bases))}" if bases and not options["--base"] else ""
    values = {"--base": options["--base"] or next(iter(bases), "smollm2"), "--data": options["--data"] or "my.jsonl",
              "--name": options["--name"] or "mine"}  # fmt: skip
    typed = " ".join(f"{option} {shown(value)}" for option, value in values.items())
    raise click.UsageError(f"{says} {are} missing; such as: loratool train {typed}{known}")


def _bases(registry: str | None) -> list[str]:
    from loratool.library.bases import base_list
    from registry import RegistryError

    try:
        return [record.name for record in base_list(registry=registry)]
    except RegistryError:
        return []


def _print_result(result: TrainResult) -> None:
    record, outcome, recipe = result.record, result.outcome, result.recipe
    click.echo(f"Trained {click.style(shown(record.reference), bold=True)} on {shown(recipe.base)}")
    where = (
        f"on {counted(recipe.validation, 'sample')} held out"
        if outcome.is_held_out
        else "on its first and last samples"
    )
    change = outcome.loss - outcome.loss_before
    print_facts(
        [
            ("loss", f"{outcome.loss_before:.3f} before, {outcome.loss:.3f} after ({change:+.3f}), {where}"),
            ("by rank", _by_rank(outcome.loss_by_rank)),
            ("adapter", f"{record.kind}, rank {_rank(record)}, on {targets(record.target_modules)}"),
            ("size", f"{size(record.size_bytes)} {record.dtype}"),
            ("took", f"{counted(recipe.steps, 'step')}, {duration(outcome.seconds)}, "
                     f"{outcome.tokens_per_second:,.0f} tokens/s, {size(outcome.peak_memory_bytes)}"),
            ("written to", shown_path(result.out)),
            ("log", shown_path(result.log)),
            ("picture", "" if result.plot is None else shown_path(result.plot)),
        ]
    )  # fmt: skip
    name, base = shown(record.name), shown(result.base)
    if record.is_catalogued:
        click.echo(f"\nNext: loratool show {name}\n      loratool merge {name} --into {base}")
    else:
        click.echo("\nNext: " + to_paste(f"loratool merge PATH --into {base}", near(result.out), ""))


def _rank(record: AdapterRecord) -> str:
    """Format the rank; if modules differ, as the average and the range."""
    by_module = list((record.ranks or {}).values())
    if len(set(by_module)) < 2:
        return ranks(record.kind, record.rank)
    return f"{sum(by_module) / len(by_module):.3g} on average ({min(by_module)} to {max(by_module)})"


def _by_rank(losses: dict[int, float]) -> str:
    return "  ".join(f"{rank}:{loss:.3f}" for rank, loss in losses.items())
