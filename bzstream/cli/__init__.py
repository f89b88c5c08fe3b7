"""The command line, one file a command.

Exit status: 0 done, 1 it failed (one clear line on stderr), 2 wrong usage. A command's file imports what it needs
inside its function, and only the file of the command that is named is loaded at all, so that `bzstream --help` and
`bzstream pull` never pay for another command.
"""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from bzstream.cli._options import INTERRUPTED
from bzstream.cli._output import flush_results, prepare_streams
from bzstream.errors import BzstreamError

__all__ = ["command_line", "main"]

COMMANDS = (
    "publish", "inspect", "versions", "use", "remove", "sign", "backup", "serve", "info", "pull", "sync", "commit",
    "submit", "bench", "evaluate", "weights", "settings", "demo",
)  # fmt: skip
"""In the order of a subnet's day: the file `cli/<name>.py` holds the function `<name>`."""

EXTRAS = {"torch": "validator", "transformers": "validator", "bittensor": "validator", "psycopg": "validator"}
"""Module that the base does not bring -> the extra that does."""


def command_line(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with these commands."""
    found = typer.Typer(
        name="bzstream",
        help="Hand out a mixture-of-experts model at the speed of the kernel, take in what miners trained, score it.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    # With a callback a single command keeps its name; without one typer would leave the word `pull` out.
    found.callback()(_begin)
    for name in commands:
        found.command(name, cls=_Command)(
            _interruptible(getattr(importlib.import_module(f"bzstream.cli.{name}"), name))
        )
    return found


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the exit status of Ctrl-C that shells expect."""

    @functools.wraps(command)
    def run(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            print("bzstream: stopped", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return run


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # 15 ms that no other command need pay

        print(f"bzstream {version('bzstream')}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show bzstream's version and exit.")
]


class _Command(TyperCommand):
    """A command that has the top command's `--version` too, unless it means a model's version by that word."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)
        if any("--version" in param.opts for param in found):
            return found
        top = [] if ctx.parent is None else ctx.parent.command.params
        shown = [copy.copy(param) for param in top if "--version" in param.opts]
        for param in shown:
            param.expose_value = False  # the command's function has no such parameter
        return [*found[:-1], *shown, found[-1]]


def _begin(show_version: _Version = False) -> None:  # not `version`, which is an argument of `use`
    """Collect garbage from here on, and not among what was loaded to get here: all that stays."""
    gc.freeze()
    gc.enable()


def main() -> None:
    """Run the command line and turn what a person can act on into one line and exit status 1.

    The garbage collector would find nothing in what a start loads, nor matters it to an end: without it there both
    together take 0.14 s, with it 0.19 (`bzstream inspect` of no file, median of 25).
    """
    prepare_streams()
    gc.disable()
    atexit.register(gc.freeze)
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    try:
        try:
            command_line(named or COMMANDS)(prog_name="bzstream")
        finally:
            written = flush_results("the output cannot be written")
    except SystemExit as end:
        sys.exit(end.code or int(not written))
    except BzstreamError as error:
        print(f"bzstream: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
            print(
                f"bzstream: this needs {error.name}; install it with: pip install 'bzstream[{extra}]'", file=sys.stderr
            )
            sys.exit(1)
        # Nothing that a person did wrong: say where it is, in a line that can be put into a report.
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        print(
            f"bzstream: this is a bug ({type(error).__name__} in {place}: {error}); please report it", file=sys.stderr
        )
        sys.exit(1)
