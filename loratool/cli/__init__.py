"""The command line: one module a command, loaded when it is used. It parses, calls `loratool.library`, and renders."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Final

import click

COMMANDS: Final = {
    "add": "Catalogue an adapter that exists.",
    "base": "Name and fingerprint base models.",
    "doctor": "Check the catalogue against the disk.",
    "export": "Write an adapter as a PEFT folder or a single file.",
    "list": "The catalogue of adapters.",
    "merge": "Adapters into the weights of a base model.",
    "remove": "Forget an adapter.",
    "show": "One adapter: everything known.",
    "tag": "Put tags on an adapter, or take them off.",
    "unmerge": "Take a merge out again, bit for bit.",
    "verify": "Check a merged model byte by byte.",
}
"""Each command and what it does, in the words of ``loratool --help``; its module and function have its name."""

EXAMPLES: Final = """\b
Examples:
  loratool base add smollm2 models/smollm2
  loratool add pirate.safetensors --base smollm2
  loratool list
  loratool merge pirate --into smollm2 --undo
  loratool unmerge smollm2-pirate
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run, so that ``--help`` costs nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"loratool.cli.{cmd_name}_command").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            from loratool.errors import nearest, quoted

            near = nearest(name, COMMANDS)
            hint = f"; did you mean '{near[0]}'?" if near else "; see 'loratool --help'"
            raise click.UsageError(f"there is no command {quoted(name)}{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLES,
)
@click.version_option(package_name="loratool", prog_name="loratool", message="%(prog)s %(version)s")
@click.option("--registry", metavar="URL", help="SQLAlchemy URL of the catalogue, instead of the one in LORATOOL_HOME.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, registry: str | None, debug: bool) -> None:
    """Keep LoRA adapters the way git keeps source: named, hashed, tied to the exact base model they belong to, and put
    into and taken out of its weights without guessing."""
    ctx.obj = registry


def main() -> None:
    """Run the command line; exit with 0, with 1 for an error, 2 for wrong usage, 130 when interrupted."""
    if "--debug" in sys.argv[1:]:
        # Wherever it stands on the line.
        sys.argv = [sys.argv[0], "--debug", *(word for word in sys.argv[1:] if word != "--debug")]
    debug = "--debug" in sys.argv[1:2]
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was changed.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has gone (``loratool list | head``): no more can be said, and nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        click.echo(f"Error: {_explained(error)}", err=True)
        sys.exit(1)


def _explained(error: Exception) -> str:
    from loratool.errors import LoratoolError, printable

    registry = sys.modules.get("registry.errors")
    if isinstance(error, LoratoolError) or (registry and isinstance(error, registry.RegistryError)):
        return str(error)
    if isinstance(error, OSError):
        return printable(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    return printable(f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it prints")
