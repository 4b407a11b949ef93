"""Options that several commands share, and the examples at the end of each command's help."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Literal

import click

Alpha = float | Literal["rank"]
"""What ``--alpha`` takes (`loratool.formats.alpha`, which is not imported to show a help)."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class PathType(click.Path):
    """A path as typed. An empty one is refused: it comes from an unset shell variable and would mean the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        if "\0" in os.fsdecode(value):
            self.fail("the path has a zero byte", param, ctx)
        return super().convert(value, param, ctx)


def _check_alpha(ctx: click.Context, param: click.Parameter, value: str | None) -> Alpha | None:
    if value is None:
        return None
    if value == "rank":
        return "rank"
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor 'rank'", ctx, param) from None


def _check_device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value) is None:
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda or cuda:N", ctx, param)
    return value


json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
verbose_option: Decorator = click.option("--verbose", is_flag=True, help="List every tensor.")
force_option: Decorator = click.option(
    "--force", is_flag=True, help="Replace an output of the same kind that loratool wrote."
)
any_base_option: Decorator = click.option(
    "--any-base", is_flag=True, help="Allow a base whose fingerprint differs from the recorded one."
)
device_option: Decorator = click.option(
    "--device",
    callback=_check_device,
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where to compute.",
)
alpha_option: Decorator = click.option(
    "--alpha",
    callback=_check_alpha,
    metavar="X|rank",
    help="lora_alpha for a bare file that records none; rank: each module's rank, a scaling of 1.",
)


class ExampleCommand(click.Command):
    """A command whose help ends with a section of examples, one per line of its epilog."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        lines = (self.epilog or "").split("\n")
        with formatter.section("Example" if len(lines) == 1 else "Examples"):
            formatter.write("".join(f"{'':{formatter.current_indent}}{line}\n" for line in lines))


class ExampleGroup(ExampleCommand, click.Group):
    """A group of commands whose help ends with examples, and which answers an unknown command with a hint."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, commands = args[0] if args else "", self.list_commands(ctx)
        if name not in commands and not name.startswith("-"):
            from loratool.cli.guesses import hint_for
            from loratool.errors import quoted

            raise click.UsageError(
                f"there is no command {quoted(name)}; {hint_for(name, ctx.command_path, commands)}", ctx
            )
        return super().resolve_command(ctx, args)


def example(text: str) -> dict[str, Any]:
    """Return the settings of a command whose help ends with these examples."""
    return {"cls": ExampleCommand, "epilog": text}
