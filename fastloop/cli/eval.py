"""`fastloop eval`: how well a model listens, through the real engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import ConfigError
from ..errors import FastloopError
from .terminal import complain, cpu_threads
from .train import MISSING

if TYPE_CHECKING:
    from ..checkpoint import Model
    from ..soundflow.benchmarks import Item

    Replied = tuple[Item, str]

eval_app = typer.Typer(
    name="eval", no_args_is_help=True, help="Measure how well a model listens: streams, proactive, offline."
)

ModelName = Annotated[str, typer.Option(help="A packaged model, or a checkpoint directory.")]
Out = Annotated[Path | None, typer.Option(help="Directory for the JSON files and the plot.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what is computed in.")]
Sessions = Annotated[int, typer.Option(help="Streams side by side.")]
Threshold = Annotated[
    float | None, typer.Option(help="Respond when p(respond) is above it; without it, as the model says.")
]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
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
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many streams; 0: all.")] = 0,
    sessions: Sessions = 16,
    threshold: Threshold = None,
    window: Annotated[float, typer.Option(help="Seconds of sound that the model looks back on.")] = 60.0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Triggers, false triggers, latencies, words and replies on streams whose truth is known.

    \b
    A line of the manifest is what `fastloop data` writes beside a sound: id, stream_scene_type, ability,
    sub_task, split, duration_s, audio_path (relative to the manifest) and turns (label, assistant,
    start_s, end_s, answer_s). Every figure has a 95 % interval. Answers are kept in --out as they come: the
    same command goes on where it was cut off.
    Examples:
      fastloop eval streams corpus --model demo --out report
      fastloop eval streams street.jsonl --model runs/nano/model --threshold 0.8
    """
    with _failures("streams"):
        from ..soundflow import evaluate, scorecard
        from ..soundflow.hear import Hearing
        from ..soundflow.kept import hear_kept
        from ..soundflow.truth import read_truth

        loaded = _load(model, dtype, device, threads)
        skipped: list[str] = []
        pairs = read_truth(manifest, None if split == "all" else split, skipped.append, limit)
        _make_folder(out)
        _report_skipped("streams", skipped)
        how = Hearing(sessions=sessions, threshold=_own(threshold, loaded), window_s=window)
        names, sounds = [stream.id for stream, _ in pairs], [pcm for _, pcm in pairs]
        file = None if out is None else out / "streams.answers.jsonl"
        began = time.monotonic()
        with _bar("streams", len(pairs)) as show:
            heard = hear_kept(loaded, names, sounds, how, file, show)
        wall_s = time.monotonic() - began
        found = zip(pairs, heard.answers, strict=True)
        outcomes = [evaluate.match(stream, said) for (stream, _), said in found]
        scores = evaluate.score(outcomes)
        console = Console()
        pace = [f"{len(heard.before)} of them answered before"] if heard.before else []
        if now_s := sum(stream.seconds for i, (stream, _) in enumerate(pairs) if i not in heard.before):
            pace.append(f"{now_s / wall_s:.1f} x real time, {sessions} side by side")
        console.print(f"{model}: {scores.streams} streams, {scores.hours:.2f} h, {', '.join(pace)}")
        console.print(scorecard.figures_table("all", scores.figures))
        console.print(scorecard.figures_table("right words, by label", scores.right))
        console.print(scorecard.figures_table("silence kept, by label", scores.silence))
        console.print(scorecard.figures_table("right words, by level over all else", scores.noise))
        if scores.questions:
            console.print(scorecard.figures_table("right answers, by question", scores.questions))
        if out is not None:
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
    threshold: Threshold = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Proactive-Sound-Effect-Benchmark: respond or ignore, by domain and folder.

    \b
    predictions.jsonl is what the benchmark's own evaluate.py reads (id, _raw_reply). Answers are kept in
    --out as they come: the same command goes on where it was cut off.
    Example:
      fastloop eval proactive proactive_reply_benchmark.jsonl --audio . --model demo --out report
    """
    with _failures("proactive"):
        from ..soundflow import proactive, scorecard
        from ..soundflow.benchmark_files import BenchmarkError
        from ..soundflow.hear import Hearing

        if tier not in proactive.TIERS:
            raise ConfigError(f"--tier: choose from {', '.join(proactive.TIERS)}, got {tier!r}")
        items = proactive.read_benchmark(manifest)
        sounds, problems = proactive.read_sounds(items, audio)
        _report_skipped("proactive", problems)
        usable = [i for i, sound in enumerate(sounds) if len(sound)]
        if not usable:
            raise BenchmarkError(f"{audio}: none of the {len(items)} sounds is there")
        _make_folder(out)
        loaded = _load(model, dtype, device, threads)
        how = Hearing(sessions=sessions, threshold=_own(threshold, loaded), system_prompt=prompt)
        chosen = [items[i] for i in usable]
        streams = -(-len(chosen) // (1 if tier == "single" else proactive.TOGETHER))
        with _bar("streams", streams) as show:
            used, file = [sounds[i] for i in usable], out / "proactive.answers.jsonl"
            verdicts = proactive.run_benchmark(loaded, chosen, used, how, tier, show, file)
        found = proactive.table(verdicts)
        console = Console()
        for name, figures in found.items():
            console.print(scorecard.figures_table(f"right decisions, {name}", figures))
        scorecard.write_lines(out / "predictions.jsonl", [v.prediction() for v in verdicts])
        head = {"model": model, "fingerprint": loaded.fingerprint, "tier": tier, "options": how}
        scorecard.write_json(out / "proactive.json", {**head, "skipped": problems, "accuracy": found})
        scorecard.plot_proactive(found, out / "proactive.png")
        console.print(f"{out}: predictions.jsonl, proactive.json, proactive.png")


@eval_app.command("offline")
def offline_command(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="mmau, mmau-spoken, llama-questions, web-questions, alpaca-eval, sd-qa, librispeech, "
            "covost2-en-zh or covost2-zh-en."
        ),
    ],
    path: Annotated[Path, typer.Argument(help="Its folder or file, in the layout it is published in.")],
    audio: Annotated[Path | None, typer.Option(help="Folder of its clips, where they lie elsewhere.")] = None,
    spoken: Annotated[
        Path | None, typer.Option(help="mmau-spoken: folder of ID.wav; else espeak-ng speaks.")
    ] = None,
    model: ModelName = "demo",
    mode: Annotated[str, typer.Option(help="offline: the clip at once; streaming: as it comes.")] = "offline",
    out: Annotated[Path, typer.Option(help="Directory for answers, JSON and plot.")] = Path("offline"),
    instruction: Annotated[
        str | None,
        typer.Option(
            help="What to do with a clip that brings no question ('': nothing is said); else the set's."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="System prompt; else the model's own.")] = None,
    judge: Annotated[
        str, typer.Option(help="OpenAI-compatible endpoint that judges answers, such as http://host:8000/v1.")
    ] = "",
    judge_model: Annotated[str, typer.Option(help="Name of its model.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many clips; 0: all.")] = 0,
    sessions: Sessions = 16,
    tokens: Annotated[int, typer.Option(help="Most tokens of a response.")] = 256,
    threshold: Threshold = None,
    window: Annotated[float, typer.Option(help="streaming: seconds that the model looks back on.")] = 60.0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """MMAU, LlamaQuestions, WebQuestions, AlpacaEval, SD-QA, LibriSpeech, CoVoST 2: answers about clips.

    \b
    Answers are kept as they come: the same command goes on where it was cut off. A judge is asked about
    alpaca-eval (1 to 5) and, where given, about the questions (right or wrong); its key is read from
    FASTLOOP_LLM_KEY. Layouts and scoring: fastloop/soundflow/benchmarks.py, offline_score.py.
    Examples:
      fastloop eval offline librispeech LibriSpeech --model runs/big/model --out report
      fastloop eval offline mmau MMAU --mode streaming --out report
      fastloop eval offline alpaca-eval voicebench --judge http://host:8000/v1 --judge-model name
    """
    with _failures("offline"):
        from ..soundflow import offline, voices
        from ..soundflow.benchmarks import ANSWER, BENCHMARKS, OPEN, Folders, read_items
        from ..soundflow.hear import Hearing

        if bool(judge) != bool(judge_model):
            raise ConfigError("--judge and --judge-model belong together: an address and a name")
        items = read_items(benchmark, Folders(path, audio, spoken), limit)
        chosen = BENCHMARKS[benchmark]
        if judge and chosen.kind not in (ANSWER, OPEN):
            raise ConfigError(f"--judge: {benchmark} is scored without one")
        speaker = str(spoken or voices.version()) if benchmark == "mmau-spoken" else None
        asked = chosen.instruction if instruction is None else instruction or None
        loaded = _load(model, dtype, device, threads)
        hearing = Hearing(sessions, window, _own(threshold, loaded), prompt, tokens)
        how = offline.How(mode, hearing, asked, speaker)
        stem, skipped = out / f"{benchmark}-{mode}", list[str]()
        with _bar("clips", len(items)) as show:
            said = offline.answer(
                loaded, items, how, stem.with_suffix(".answers.jsonl"), skipped.append, show
            )
        _report_skipped("offline", skipped)
        replied = [(item, said[item.id]) for item in items if item.id in said]
        head = {"benchmark": benchmark, "model": model, **offline.described(loaded, how), "skipped": skipped}
        _offline_report(benchmark, replied, head, stem, judge, judge_model)


def _offline_report(
    benchmark: str, replied: Sequence[Replied], head: dict[str, Any], stem: Path, judge: str, judge_model: str
) -> None:
    """Judge where wanted, score, print, write."""
    from ..soundflow import offline_score, scorecard
    from ..soundflow.benchmarks import BENCHMARKS, CHOICE
    from ..soundflow.llm import Endpoint
    from ..soundflow.offline_judge import judge as ask

    chosen, verdicts = BENCHMARKS[benchmark], None
    if judge:
        endpoint = Endpoint(judge, judge_model, stem.with_suffix(".judged"), temperature=0.0)
        with _bar("verdicts", len(replied)) as show:
            verdicts, missing = ask(endpoint, chosen.kind, replied, show)
        head |= {"judge": judge_model, "unjudged": missing}
        if missing:
            complain("eval offline", f"{len(missing)} answers got no verdict:")
            for line in missing:
                typer.echo(f"  {line}", err=True)
    scores = offline_score.score(chosen, replied, verdicts)
    by = offline_score.describe(chosen) + (f", judged by {judge_model}" if judge else "")
    head |= {"scored_by": by, "published": chosen.published}
    scorecard.write_json(stem.with_suffix(".json"), {**head, "clips": len(replied), "scores": scores})
    scorecard.plot_offline(scores, stem.with_suffix(".png"))
    if chosen.kind == CHOICE:
        rows = [{**item.row, "model_output": r, "model_prediction": r} for item, r in replied]
        scorecard.write_json(stem.with_suffix(".predictions.json"), rows)
    console = Console()
    flat = {f"{name}, {group}": f for name, groups in scores.items() for group, f in groups.items()}
    title = f"{benchmark}, {head['mode']}: {len(replied)} clips, {len(head['skipped'])} unreadable"
    console.print(scorecard.figures_table(title, flat))
    console.print(f"scored by {head['scored_by']}")
    console.print(f"the paper's 3 B model, which is another one: {chosen.published}")
    console.print(f"{stem.parent}: {', '.join(sorted(f.name for f in stem.parent.glob(stem.name + '.*')))}")


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


def _make_folder(out: Path | None) -> None:
    """Before anything is measured: what cannot be written to is found out at once."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error}") from error


def _load(name: str, dtype: str, device: str, threads: int) -> Model:
    import torch

    from ..checkpoint import load

    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"--device: choose cpu, cuda or cuda:1 and so on, got {device!r}")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    torch.set_num_threads(cpu_threads(threads))
    return load(name, dtype=dtype, device=device)


def _own(threshold: float | None, model: Model) -> float:
    """The threshold that was asked for, or the model's, so that a report names it."""
    return model.config.threshold if threshold is None else threshold


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
