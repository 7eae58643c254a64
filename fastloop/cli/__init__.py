"""The command line: `fastloop listen | doctor | convert | data | train | eval | bench`.

Exit codes: 0 done; 1 something failed; 2 bad input or bad options; 130 stopped by Ctrl-C; 143 by SIGTERM.
Errors are one line each on standard error. What needs torch is imported when a command runs.
"""

from __future__ import annotations

import functools
import io
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .. import __version__
from ..config import ConfigError
from ..errors import FastloopError
from .bench import bench_app
from .convert import convert_command
from .data import data_app
from .doctor import doctor_command
from .eval import eval_app
from .listen import listen_command
from .terminal import complain
from .train import train_command


class OneLineErrors(TyperGroup):
    """Usage errors as one line, not as a box of several."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        run = functools.partial(super().main, args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return run(**extra)
        try:
            code = run(**extra)
        except typer.Abort:
            complain("", "aborted")
            sys.exit(1)
        except Exception as error:
            _exit_of(error)
        sys.exit(code if isinstance(code, int) else 0)


def _exit_of(error: Exception) -> NoReturn:
    """Usage errors end here (whichever class this version of typer raises), and what no command has taken: a
    wrong setting of the environment, a disk that is full. Any other error goes on.
    """
    if isinstance(error, (ConfigError, FastloopError, OSError)):
        complain("", error)
        sys.exit(1 if isinstance(error, OSError) else 2)
    describe, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if describe is None or code is None:
        raise error
    path = getattr(getattr(error, "ctx", None), "command_path", "fastloop")
    complain(path.removeprefix("fastloop").strip(), f"{describe()} (see {path} --help)")
    sys.exit(code)


app = typer.Typer(
    name="fastloop",
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def fastloop(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """A model that listens all the time and answers only when it should.

    \b
    Examples:
      fastloop listen --demo          hear the packaged model on its sound
      fastloop listen door.wav        a file of your own
      fastloop listen --mic           the microphone
      fastloop doctor                 this machine, and whether it computes right
    """
    if version:
        typer.echo(f"fastloop {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("listen")(listen_command)
app.command("doctor")(doctor_command)
app.command("convert")(convert_command)
app.command("train")(train_command)
app.add_typer(eval_app)
app.add_typer(data_app)
app.add_typer(bench_app)


def _terminate(*_: object) -> NoReturn:
    """End in order: what is half done is cleaned up, what was heard is summed up."""
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Entry point of the `fastloop` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="fastloop")
