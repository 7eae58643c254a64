"""`fastloop data`: streams to train on, built, looked at, counted."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import FastloopError
from .terminal import complain

if TYPE_CHECKING:
    from ..soundflow.workshop import BuildConfig, Built

data_app = typer.Typer(name="data", no_args_is_help=True, rich_markup_mode="rich")


@data_app.callback()
def data() -> None:
    """Make streams to train on, and look at them.

    \b
    Examples:
      fastloop data build --clips manifest.jsonl --out corpus --hours 10
      fastloop data show corpus                     what it holds
      fastloop data inspect cough.wav --out figures what preprocessing does to a clip
      fastloop data tasks                           abilities and sub-tasks
    """


def _fail(command: str, error: Exception) -> NoReturn:
    complain(f"data {command}", str(error))
    raise typer.Exit(2)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


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
    tasks: Annotated[str, typer.Option(help="Sub-tasks, by comma, or `all`; else the default mix.")] = "",
    scenarios: Annotated[
        list[Path] | None, typer.Option(help="A scenario file (repeatable); else the shipped ones.")
    ] = None,
    exclude: Annotated[str, typer.Option(help="Labels to leave out, by comma.")] = "",
    tfjp: Annotated[bool, typer.Option(help="Prepare clips in time and frequency before joining.")] = True,
    planner: Annotated[
        str, typer.Option(help="Who chooses the events: grammar, random (nobody does), or llm.")
    ] = "grammar",
    llm_url: Annotated[
        str, typer.Option(help="OpenAI-compatible endpoint, such as http://host:8000/v1.")
    ] = "",
    llm_model: Annotated[str, typer.Option(help="Name of its model.")] = "",
    llm_kept: Annotated[str, typer.Option(help="Folder for its answers: the same again costs nothing.")] = "",
    ray: Annotated[
        bool, typer.Option("--ray", help="Run on Ray Data, on the cluster of RAY_ADDRESS.")
    ] = False,
) -> None:
    """Mix clips and synthetic sounds into streams with exact event times, as webdataset shards.

    Speech in synthetic voices is made with espeak-ng. An endpoint's key is read from FASTLOOP_LLM_KEY.

    \b
    Examples:
      fastloop data build --clips manifest.jsonl --out corpus --hours 10
      fastloop data build --clips manifest.jsonl --out corpus --split val --hours 1
      fastloop data build --clips manifest.jsonl --out digits --tasks digits_live --seconds 25.6
      fastloop data build --clips manifest.jsonl --out plain --no-tfjp --planner random
      fastloop data build --clips manifest.jsonl --out corpus --hours 1000 --ray
    """
    from ..soundflow.builder import unused
    from ..soundflow.workshop import BuildConfig

    try:
        config = BuildConfig(
            manifest=str(clips.absolute()),
            split=split,
            seed=seed,
            hours=hours,
            shard_s=shard_minutes * 60,
            seconds=seconds,
            tasks=_names(tasks),
            scenarios=tuple(str(path.absolute()) for path in scenarios or ()),
            exclude=_names(exclude),
            tfjp=tfjp,
            planner=planner,
            llm_url=llm_url,
            llm_model=llm_model,
            llm_kept=llm_kept,
        )
        built = _with_progress(config, out, workers if ray else workers or os.cpu_count() or 1, ray)
    except FastloopError as error:
        _fail("build", error)
    typer.echo(
        f"{out}: {built.made} shards made, {built.found} were there; {built.streams} streams, "
        f"{built.seconds / 3600:.2f} h"
    )
    if built.rejected:
        kinds = ", ".join(f"{count} {kind}" for kind, count in built.rejected.most_common())
        typer.echo(f"{built.rejected.total()} streams were not suitable and drawn again: {kinds}")
    if built.unreadable:
        typer.echo(f"{len(built.unreadable)} clips could not be read and were skipped:")
        for name, reason in sorted(built.unreadable.items()):
            typer.echo(f"  {name}: {reason}")
    if idle := unused(config):
        kinds = ", ".join(f"{count} {label}" for label, count in idle.most_common())
        typer.echo(
            f"{idle.total()} clips serve nowhere (no scenario names their label, or nothing tells which "
            f"digits are in their speech, and when): {kinds}"
        )


def _with_progress(config: BuildConfig, out: Path, workers: int, ray: bool) -> Built:
    from ..soundflow.builder import build

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=config.shards)

        def show(so_far: Built, shards: int) -> None:
            bar.update(task, completed=so_far.made + so_far.found, total=shards)

        return build(config, out, workers, ray, show)


@data_app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(help="Online JSONL of the released training code.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the noise between the clips.")] = 0,
) -> None:
    """Turn conversations in the released code's JSONL into shards.

    A line is {"conversation": [{"audio_path", "assistant", "emotion"}, ...]}.

    \b
    Example:
      fastloop data import conversations.jsonl --out corpus
    """
    from ..soundflow.conversations import import_online

    try:
        done = import_online(source, out, split, seed)
    except FastloopError as error:
        _fail("import", error)
    typer.echo(f"{out}: {done.streams} streams from {source}")
    if done.skipped:
        typer.echo(f"{len(done.skipped)} conversations were left out:")
        for reason in done.skipped:
            typer.echo(f"  {reason}")


@data_app.command("inspect")
def inspect_command(
    clips: Annotated[list[Path], typer.Argument(help="Sound files; or a shard (.tar): its first streams.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures.")],
    streams: Annotated[int, typer.Option(min=1, help="How many streams of a shard to draw.")] = 4,
) -> None:
    """Draw spectrograms: a clip before and after each step of preprocessing; a stream with its events.

    \b
    Examples:
      fastloop data inspect cough.wav bark.flac --out figures
      fastloop data inspect corpus/train-00000.tar --out figures --streams 8
    """
    from ..soundflow.inspect import inspect_clips, inspect_shard

    failed = False
    try:
        for path in clips:
            if path.suffix == ".tar":
                for picture in inspect_shard(path, out, streams):
                    typer.echo(picture)
        for picture, done in inspect_clips([path for path in clips if path.suffix != ".tar"], out):
            if isinstance(done, str):
                complain("data inspect", done)
                failed = True
                continue
            lengths = " -> ".join(f"{len(x) / 16_000:.2f}" for x in done.steps.values())
            typer.echo(f"{picture}: {lengths} s")
    except FastloopError as error:
        _fail("inspect", error)
    if failed:
        raise typer.Exit(1)


@data_app.command("show")
def show_command(
    corpus: Annotated[Path, typer.Argument(help="A folder of shards, or one shard.")],
    split: Annotated[str | None, typer.Option(help="train or val; else both.")] = None,
) -> None:
    """Count what a corpus holds: streams, hours, sub-tasks, sounds answered and ignored.

    \b
    Example:
      fastloop data show corpus --split train
    """
    from ..soundflow.shards import ShardError, find_shards, read_streams

    hours: defaultdict[str, float] = defaultdict(float)
    answered: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    try:
        skipped: list[str] = []
        for stream, _ in read_streams(find_shards([corpus]), split, skipped.append):
            hours[f"{stream.ability} / {stream.sub_task}"] += stream.seconds / 3600
            for turn in stream.turns:
                (ignored if turn.reply is None else answered)[turn.label] += 1
    except ShardError as error:
        _fail("show", error)
    typer.echo(f"{sum(hours.values()):8.2f} hours")
    for name, amount in sorted(hours.items()):
        typer.echo(f"  {amount:8.2f} {name}")
    for title, counts in (("answered", answered), ("ignored", ignored)):
        typer.echo(f"{counts.total():8d} turns {title}")
        for name, count in counts.most_common():
            typer.echo(f"  {count:8d} {name}")
    for reason in skipped:
        complain("data show", f"skipped: {reason}")


@data_app.command("tasks")
def tasks_command() -> None:
    """List the seven abilities and their sub-tasks: how each is made, or what it needs."""
    from ..soundflow.abilities import sub_tasks

    ability = ""
    for task in sub_tasks().values():
        if task.ability != ability:
            ability = task.ability
            typer.echo(ability.replace("_", " "))
        mark = "default" if task.weight > 0 else "made" if task.generated else "needs data"
        typer.echo(f"  {task.name:<26}{mark:<12}{task.how}")
        if task.needs:
            typer.echo(f"{'':<40}needs {task.needs}")
