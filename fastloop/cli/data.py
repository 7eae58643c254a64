"""`fastloop data`: streams to train on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .terminal import complain

data_app = typer.Typer(name="data", no_args_is_help=True, help="Make and look at streams to train on.")


def _fail(command: str, error: Exception, code: int = 2) -> NoReturn:
    complain(f"data {command}", str(error))
    raise typer.Exit(code)


@data_app.command("build")
def build_command(
    clips: Annotated[Path, typer.Option(help="Manifest of clips (JSON lines, with splits).")],
    out: Annotated[Path, typer.Option(help="Folder of shards; an unfinished build in it goes on.")],
    split: Annotated[str, typer.Option(help="Which clips to use: train or val.")] = "train",
    hours: Annotated[float, typer.Option(help="Hours of sound to make.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same clips: same bytes.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes; 0: as many as there are cores.")] = 0,
    shard_minutes: Annotated[float, typer.Option(help="Length of a shard.")] = 10.0,
    seconds: Annotated[float | None, typer.Option(help="Length of every stream; else drawn.")] = None,
    tasks: Annotated[str, typer.Option(help="Sub-tasks, by comma; else the default mix.")] = "",
    scenarios: Annotated[
        list[Path] | None, typer.Option(help="Scenario files; else the shipped ones.")
    ] = None,
    exclude: Annotated[str, typer.Option(help="Labels to leave out, by comma.")] = "",
) -> None:
    """Mix clips and synthetic sounds into streams with exact event times, as webdataset shards.

    \b
    Examples:
      fastloop data build --clips manifest.jsonl --out corpus --hours 10
      fastloop data build --clips manifest.jsonl --out corpus --split val --hours 1 --seed 1
      fastloop data build --clips manifest.jsonl --out digits --tasks digits_live --seconds 25.6
    """
    from ..soundflow.builder import BuildConfig, Built, build
    from ..soundflow.clips import DataError

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"),
        TimeRemainingColumn(),
    )  # fmt: skip
    try:
        config = BuildConfig(
            manifest=str(clips),
            split=split,
            seed=seed,
            hours=hours,
            shard_s=shard_minutes * 60,
            seconds=seconds,
            tasks=_names(tasks),
            scenarios=tuple(map(str, scenarios or ())),
            exclude=_names(exclude),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("building", total=config.shards)

            def show(built: Built, shards: int) -> None:
                bar.update(task, completed=built.made + built.found)

            built = build(config, out, workers or os.cpu_count() or 1, show)
    except DataError as error:
        _fail("build", error)
    typer.echo(
        f"{out}: {built.made} shards made, {built.found} were there; {built.streams} streams, "
        f"{built.seconds / 3600:.2f} h"
    )
    if built.unreadable:
        typer.echo(f"{len(built.unreadable)} clips could not be read and were skipped:")
        for reason in built.unreadable.values():
            typer.echo(f"  {reason}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
