"""`fastloop eval`: how well a model listens, through the real engine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import ConfigError
from ..errors import FastloopError
from .terminal import complain
from .train import MISSING

if TYPE_CHECKING:
    from ..checkpoint import Model

eval_app = typer.Typer(
    name="eval", no_args_is_help=True, help="Measure how well a model listens: streams, proactive."
)

ModelName = Annotated[str, typer.Option(help="A packaged model, or a checkpoint directory.")]
Out = Annotated[Path | None, typer.Option(help="Directory for the JSON files and the plot.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what is computed in.")]
Sessions = Annotated[int, typer.Option(help="Streams side by side.")]
Threshold = Annotated[float, typer.Option(help="Respond when p(respond) is above it.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: as many as there are cores.")]


@eval_app.command("streams")
def streams_command(
    manifest: Annotated[
        list[Path],
        typer.Argument(help="JSON lines of streams with their truth, or shards of `fastloop data`."),
    ],
    model: ModelName = "demo",
    out: Out = None,
    split: Annotated[str, typer.Option(help="Of the streams: val, train, or all.")] = "val",
    limit: Annotated[int, typer.Option(help="Only the first so many streams; 0: all.")] = 0,
    sessions: Sessions = 16,
    threshold: Threshold = 0.5,
    window: Annotated[float, typer.Option(help="Seconds of sound that the model looks back on.")] = 60.0,
    dtype: Dtype = "float32",
    threads: Threads = 0,
) -> None:
    """Triggers, false triggers, latencies, words and replies on streams whose truth is known.

    \b
    A line of the manifest is what `fastloop data` writes beside a sound: id, stream_scene_type, ability,
    sub_task, split, duration_s, audio_path (relative to the manifest) and turns (label, assistant,
    start_s, end_s, answer_s). Every figure has a 95 % interval.
    Examples:
      fastloop eval streams corpus --model demo --out report
      fastloop eval streams street.jsonl --model runs/nano/model --threshold 0.8
    """
    with _failures("streams"):
        from ..soundflow import evaluate, scorecard
        from ..soundflow.hear import Hearing, hear
        from ..soundflow.truth import read_truth

        loaded = _load(model, dtype, threads)
        skipped: list[str] = []
        pairs = read_truth(manifest, None if split == "all" else split, skipped.append, limit)
        _report_skipped("streams", skipped)
        how = Hearing(sessions=sessions, threshold=threshold, window_s=window)
        began = time.monotonic()
        with _bar("streams", len(pairs)) as show:
            answers = hear(loaded, [pcm for _, pcm in pairs], how, show)
        wall_s = time.monotonic() - began
        outcomes = [evaluate.match(stream, said) for (stream, _), said in zip(pairs, answers, strict=True)]
        scores = evaluate.score(outcomes)
        console = Console()
        speed = scores.hours * 3600 / wall_s
        console.print(
            f"{model}: {scores.streams} streams, {scores.hours:.2f} h, {speed:.1f} x real time, "
            f"{sessions} side by side"
        )
        console.print(scorecard.figures_table("all", scores.figures))
        console.print(scorecard.figures_table("right words, by label", scores.right))
        console.print(scorecard.figures_table("silence kept, by label", scores.silence))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            head = {"model": model, "fingerprint": loaded.fingerprint, "dtype": dtype, "options": how}
            scorecard.write_json(out / "streams.json", {**head, "skipped": skipped, "scores": scores})
            scorecard.write_lines(out / "streams.jsonl", [scorecard.outcome_row(o) for o in outcomes])
            scorecard.plot_streams(scores, outcomes, out / "streams.png")
            console.print(f"{out}: streams.json, streams.jsonl, streams.png")


@eval_app.command("proactive")
def proactive_command(
    manifest: Annotated[
        Path, typer.Argument(help="The benchmark's JSON lines: id, path, description, decision.")
    ],
    audio: Annotated[Path, typer.Option(help="Folder that the paths of the manifest start from.")],
    model: ModelName = "demo",
    out: Annotated[Path, typer.Option(help="Directory for predictions, JSON and plot.")] = Path("proactive"),
    tier: Annotated[str, typer.Option(help="single: every sound alone; multi: four in a stream.")] = "single",
    prompt: Annotated[str | None, typer.Option(help="System prompt; else the model's own.")] = None,
    sessions: Sessions = 16,
    threshold: Threshold = 0.5,
    dtype: Dtype = "float32",
    threads: Threads = 0,
) -> None:
    """Proactive-Sound-Effect-Benchmark: respond or ignore, by domain and folder.

    \b
    predictions.jsonl is what the benchmark's own evaluate.py reads (id, _raw_reply).
    Example:
      fastloop eval proactive proactive_reply_benchmark.jsonl --audio . --model demo --out report
    """
    with _failures("proactive"):
        from ..soundflow import proactive, scorecard
        from ..soundflow.hear import Hearing

        if tier not in proactive.TIERS:
            raise ConfigError(f"--tier: choose from {', '.join(proactive.TIERS)}, got {tier!r}")
        items = proactive.read_benchmark(manifest)
        sounds, problems = proactive.read_sounds(items, audio)
        _report_skipped("proactive", problems)
        usable = [i for i, sound in enumerate(sounds) if len(sound)]
        if not usable:
            raise proactive.BenchmarkError(f"{audio}: none of the {len(items)} sounds is there")
        loaded = _load(model, dtype, threads)
        how = Hearing(sessions=sessions, threshold=threshold, system_prompt=prompt)
        chosen = [items[i] for i in usable]
        with _bar("streams", None) as show:
            verdicts = proactive.run_benchmark(loaded, chosen, [sounds[i] for i in usable], how, tier, show)
        found = proactive.table(verdicts)
        out.mkdir(parents=True, exist_ok=True)
        scorecard.write_lines(out / "predictions.jsonl", [v.prediction() for v in verdicts])
        head = {"model": model, "fingerprint": loaded.fingerprint, "tier": tier, "options": how}
        scorecard.write_json(out / "proactive.json", {**head, "skipped": problems, "accuracy": found})
        scorecard.plot_proactive(found, out / "proactive.png")
        console = Console()
        for name, figures in found.items():
            console.print(scorecard.figures_table(f"right decisions, {name}", figures))
        console.print(f"{out}: predictions.jsonl, proactive.json, proactive.png")


@contextlib.contextmanager
def _failures(command: str) -> Iterator[None]:
    """Errors as one line: 2 for bad input, 1 for what is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        complain(f"eval {command}", f"{error}; {MISSING}")
        raise typer.Exit(1) from error
    except (ConfigError, FastloopError) as error:
        complain(f"eval {command}", str(error))
        raise typer.Exit(2) from error


def _load(name: str, dtype: str, threads: int) -> Model:
    import torch

    from ..checkpoint import load

    torch.set_num_threads(threads or os.cpu_count() or 1)
    return load(name, dtype=dtype)


def _report_skipped(command: str, problems: list[str]) -> None:
    if problems:
        complain(f"eval {command}", f"{len(problems)} could not be used:")
        for line in problems:
            typer.echo(f"  {line}", err=True)


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
