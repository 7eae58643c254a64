"""The command itself and the package's public names."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import fastloop
from fastloop.cli import OneLineErrors
from fastloop.config import ConfigError

Run = Callable[..., Result]


def test_without_a_command_it_helps(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    for command in ("listen", "doctor", "convert", "--demo"):
        assert command in result.stdout
    assert run("--help").stdout == result.stdout


@pytest.mark.parametrize("command", ["listen", "doctor", "convert"])
def test_every_help_has_examples(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"fastloop {command}" in result.stdout and "Examples" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"), [(["lisen"], "lisen"), (["--no-such"], "--no-such"), (["convert"], "convert: ")]
)
def test_usage_errors_are_one_line(run: Run, arguments: list[str], told: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("fastloop") and told in result.stderr and result.stderr.count("\n") == 1


def test_convert_is_wired(run: Run, model_dir: Path, tmp_path: Path) -> None:
    result = run("convert", model_dir / "missing", tmp_path / "new")
    assert result.exit_code != 0 and "missing" in result.stderr and not (tmp_path / "new").exists()


ENDS = [
    (typer.Abort(), 1),
    (KeyboardInterrupt(), 130),
    (typer.Exit(7), 7),
    (OSError(28, "No space left on device"), 1),
    (ConfigError("a wrong setting"), 2),
]


@pytest.mark.parametrize(("raised", "code"), ENDS)
def test_ways_to_end(raised: BaseException, code: int) -> None:
    app = typer.Typer(cls=OneLineErrors)

    @app.callback()
    def group() -> None: ...

    @app.command()
    def end() -> None:
        raise raised

    result = CliRunner().invoke(app, ["end"], prog_name="fastloop")
    assert result.exit_code == code
    if isinstance(raised, (OSError, ConfigError)):
        assert result.stderr == f"fastloop: {raised}\n"


def test_errors_of_the_program_are_not_hidden() -> None:
    app = typer.Typer(cls=OneLineErrors)

    @app.callback()
    def group() -> None: ...

    @app.command()
    def end() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(app, ["end"], catch_exceptions=False)


def test_public_names() -> None:
    for name in fastloop.__all__:
        assert getattr(fastloop, name) is not None
        assert name in dir(fastloop)
    with pytest.raises(AttributeError, match="no_such_name"):
        fastloop.no_such_name  # noqa: B018


def test_the_installed_version_is_this_one() -> None:
    try:
        installed = importlib.metadata.version("fastloop")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastloop runs from its source tree, it is not installed")
    assert installed == fastloop.__version__
