"""The command line: one module per command, loaded when it is used. It parses, calls `loratool.library`, and renders."""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import islice
from typing import Any, Final, TextIO

import click

from loratool import interrupts
from loratool.cli.options import ExampleGroup
from loratool.cli.sentences import on_stderr
from loratool.interrupts import Interrupted

GROUPS: Final = {
    "Catalogue": {
        "base": "Base models, by name",
        "add": "Catalogue an adapter",
        "list": "All adapters",
        "show": "One adapter, in full",
        "tag": "Tag an adapter",
        "export": "Write an adapter out",
        "remove": "Move to the trash",
        "restore": "Restore from the trash",
        "doctor": "Check the catalogue",
    },
    "Models": {
        "merge": "Adapters into a base",
        "unmerge": "Undo a merge",
        "verify": "Check a merged model",
        "quantize": "Store a base in 4 bits",
    },
    "Adapters": {
        "truncate": "Lower an adapter's rank",
        "prune": "Drop the least ranks",
        "combine": "Several into one",
        "extract": "From a fine-tuned model",
    },
    "Training": {
        "train": "Train on your samples",
        "eval": "Measure on your text",
        "estimate": "What training will take",
    },
    "The Hub": {
        "pull": "Download an adapter",
        "push": "Upload an adapter",
        "hub": "Search it",
    },
}
"""The commands by topic, each with its text in ``loratool --help``."""

COMMANDS: Final = {name: text for group in GROUPS.values() for name, text in group.items()}
"""The text of each command. Its module and function have the command's name."""

EXAMPLE: Final = "loratool merge pirate.safetensors --into models/smollm2"


_STATUSES_OF_SIGNALS: Final = frozenset(128 + number for number in interrupts.ENDING)


class _Stopped(BaseException):
    """An interrupt, wrapped so that click does not catch it and print an empty line."""


class LazyGroup(ExampleGroup):
    """A group whose commands are imported when they are run, so that ``--help`` is fast."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _own_options_first(args))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"loratool.cli.{cmd_name}_command").command
        return command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by group, then the options, two per line, so that the help fits on a screen of 24 lines."""
        formatter.write_paragraph()
        for heading, commands in GROUPS.items():
            _write_two_a_line(formatter, heading, [f"{name:8}  {text:23}" for name, text in commands.items()])
        formatter.write_paragraph()
        records = [record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx))]
        _write_two_a_line(formatter, "Options", [f"{option:14}  {text.rstrip('.'):17}" for option, text in records])

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _in_order():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_order():
            return super().invoke(ctx)


def _write_two_a_line(formatter: click.HelpFormatter, heading: str, entries: list[str]) -> None:
    for place in range(0, len(entries), 2):
        line = f"{heading if place == 0 else '':9}  {'  '.join(entries[place : place + 2])}"
        formatter.write(f"{line.rstrip()}\n")


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXAMPLE,
)
@click.version_option(
    package_name="loratool", prog_name="loratool", message="%(prog)s %(version)s", help="Show the version."
)
@click.help_option("-h", "--help", help="Show this help.")
@click.option("--registry", metavar="URL", help="Another catalogue.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, registry: str | None, debug: bool) -> None:
    """Keep LoRA adapters the way git keeps source."""
    if registry == "":
        raise click.BadParameter("the URL is empty", ctx, param_hint="'--registry'")
    _refuse_deleted_folder()
    ctx.obj = registry
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def _refuse_deleted_folder() -> None:
    """Raise OutputError if the working folder was deleted: relative paths mean nothing there, and torch does not load."""
    try:
        os.getcwd()
    except OSError:
        from loratool.errors import OutputError

        raise OutputError(
            "the folder that you are in was deleted or cannot be accessed; change to another, such as your home with 'cd', and "
            "run again"
        ) from None


def main() -> None:
    """Run the command line. The exit status is 0, 1 for an error, 2 for wrong usage, 128 plus its number for a signal."""
    try:
        # A command makes little garbage, and collecting it would take a third of the time to import and exit torch.
        gc.disable()
        atexit.register(gc.freeze)
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Characters that the terminal's encoding lacks are escaped instead of causing an error.
            sys.stdout.reconfigure(errors="backslashreplace")
        status = cli.main(prog_name="loratool", standalone_mode=False) or 0
        interrupts.finish()
        late = interrupts.received()
        has_said_so = status in _STATUSES_OF_SIGNALS  # the command ended by a signal, and another one followed
        sys.exit(status if late is None or has_said_so else _end_interrupted(late, "what was to be done is done"))
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        click.echo(on_stderr(_printable(usage.getvalue())), err=True, nl=False)
        sys.exit(error.exit_code)
    except (_Stopped, KeyboardInterrupt, Exception) as error:
        interrupts.finish()
        stopped = _interrupt_behind(error)
        if stopped is not None or not isinstance(error, Exception):
            sys.exit(_end_interrupted(stopped or KeyboardInterrupt(), "nothing half done is left"))
        if "--debug" in _own_options_first(sys.argv[1:])[:3]:
            raise
        said = on_stderr(f"Error: {_explained(error)}").removeprefix("Error:")
        click.echo(click.style("Error:", fg="red") + said, err=True)
        sys.exit(1)


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that caused an error, if any. After a signal, any unforeseen error counts as caused by it."""
    foreseen = isinstance(error, Exception) and _is_foreseen(error)
    return interrupts.behind(error) or (None if foreseen else interrupts.received())


def _end_interrupted(stopped: KeyboardInterrupt, default: str) -> int:
    """Print in one line what was cleaned up or how to continue; return the exit status."""
    number = stopped.number if isinstance(stopped, Interrupted) else signal.SIGINT
    by = "" if number == signal.SIGINT else f" by {number.name}"
    notes = [text for text in interrupts.notes(stopped) if text] or [default]
    with suppress(OSError):
        click.echo(_printable(str(stopped) or f"Interrupted{by}: {'; '.join(notes)}."), err=True)
    return 128 + number


def run() -> None:
    """Run the installed command: `main`, then a fast exit.

    A normal exit with torch loaded takes a third of a second, only to free memory. An interrupted command exits at once,
    whatever its threads wait for.
    """
    interrupts.install()
    _open_streams()
    try:
        main()
    except SystemExit as leaving:
        interrupts.finish()
        if leaving.code in _STATUSES_OF_SIGNALS:
            os._exit(leaving.code)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                _discard(stream)
        if "torch" not in sys.modules or not isinstance(leaving.code, int):
            raise
        os._exit(leaving.code)


class _StandardOutput(io.FileIO):
    """Standard output that names itself in its errors."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


def _open_streams() -> None:
    """Replace closed standard streams, and make errors of standard output name it."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open to the end)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (it stays open to the end)
    if sys.stdout is None:
        # No result would be visible, and the next opened file would get the output of C libraries.
        click.echo("Error: standard output is closed; send it somewhere, such as >/dev/null", err=True)
        sys.exit(1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        raw = _StandardOutput(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=sys.stdout.line_buffering,
        )


@contextmanager
def _in_order() -> Iterator[None]:
    """End the command if the reader of its output is gone (``loratool list | head`` is not an error), or on an interrupt."""
    try:
        yield
    except BrokenPipeError:
        _discard(sys.stdout)
        raise click.exceptions.Exit(0) from None
    except KeyboardInterrupt as error:
        raise _Stopped from error


def _discard(stream: TextIO) -> None:
    """Discard what `stream` still holds, so that the interpreter does not try to write it again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _own_options_first(words: list[str]) -> list[str]:
    """Move ``--debug`` and ``--registry URL``, which may stand anywhere on the line, to its beginning."""
    debug: list[str] = []
    registry: list[str] = []
    others: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            others += [word, *left]
        elif word == "--debug":
            debug = [word]
        elif word == "--registry":
            registry = [word, *islice(left, 1)]
        elif word.startswith("--registry="):
            registry = [word]
        else:
            others.append(word)
    return [*debug, *registry, *others]


def _is_foreseen(error: Exception) -> bool:
    """Return whether an error is one of loratool's own, whose message says what is wrong and what to do."""
    from loratool.errors import LoratoolError

    registry = sys.modules.get("registry.errors")
    return isinstance(error, LoratoolError) or bool(registry and isinstance(error, registry.RegistryError))


def _explained(error: Exception) -> str:
    from loratool.errors import quoted

    if _is_foreseen(error):
        from loratool.cli.elsewhere import commands_instead

        return _printable("\n  ".join([str(error), *commands_instead(error, sys.argv[1:])]))
    from loratool.cli.system_errors import OUT_OF_MEMORY, explain_system_error, is_out_of_memory

    if isinstance(error, OSError):
        return _printable(explain_system_error(error))
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, UnicodeEncodeError):
        return f"{quoted(error.object)} is not valid text; write the name in UTF-8"
    return _printable(f"unexpected {type(error).__name__}: {error}; run again with --debug and report what it prints")


def _printable(text: str) -> str:
    from loratool.errors import printable

    return "\n".join(map(printable, text.split("\n")))
