"""`fastloop listen`: sound in, decisions and responses out, as they come."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import ConfigError
from ..errors import FastloopError
from ..options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from .terminal import UsageProblem, complain

if TYPE_CHECKING:
    from ..checkpoint import Model
    from ..engine import Engine
    from .hearing import Output
    from .sources import PcmFormat, Source

# A clip is attended to as a whole: memory grows with its length, time with its square.
OFFLINE_SECONDS = 300.0


class Edge(str, Enum):
    """`SessionConfig.edge` on the command line."""

    reflect = "reflect"
    wait = "wait"


class SampleFormat(str, Enum):
    """Sample formats of raw PCM."""

    s16le = "s16le"
    f32le = "f32le"


def _flag(name: str, told: str) -> Any:
    return typer.Option(name, help=told)


def _option(panel: str, told: str, **more: Any) -> Any:
    return typer.Option(rich_help_panel=panel, help=told, **more)


DECISIONS, TEXT, INPUT = "Decisions", "Text", "Raw PCM on standard input"
_FILES = "Sound files; - is raw PCM on standard input."
Files = Annotated[list[str] | None, typer.Argument(metavar="FILE", show_default=False, help=_FILES)]
Mic = Annotated[bool, _flag("--mic", "Listen to the microphone until Ctrl-C.")]
Demo = Annotated[bool, _flag("--demo", "Listen to the sound that comes with the package.")]
_MODEL = "A packaged model, or a checkpoint directory."
ModelName = Annotated[str, typer.Option(metavar="NAME|DIR", help=_MODEL)]
Realtime = Annotated[bool, _flag("--realtime", "Feed files at the speed at which they sound.")]
Json = Annotated[bool, _flag("--json", "One JSON object a line; t is stream time in seconds.")]
_OFFLINE = f"Take the whole clip (at most {OFFLINE_SECONDS:g} s) at once and answer it."
Offline = Annotated[bool, _flag("--offline", _OFFLINE)]
_QUESTION = "With --offline: a question about the clip."
Question = Annotated[str | None, typer.Option(metavar="QUESTION", help=_QUESTION)]
_THRESHOLD = "Respond when p(respond) is above it; without it, as the model says."
Threshold = Annotated[float | None, _option(DECISIONS, _THRESHOLD, metavar="P", min=0, max=1)]
_REARM = "After a response, p(respond) must first fall to it."
Rearm = Annotated[float, _option(DECISIONS, _REARM, metavar="P", min=0, max=1)]
MinGap = Annotated[float, _option(DECISIONS, "Least time between responses.", metavar="S", min=0, max=86_400)]
Window = Annotated[float, _option(DECISIONS, "Sound looked back on.", metavar="S", min=0.1, max=864_000)]
EdgeMode = Annotated[Edge, _option(DECISIONS, "wait: decide 2.5 ms later, with exact mel frames.")]
Seed = Annotated[int, _option(TEXT, "Of sampled text.", metavar="N", min=0)]
Temperature = Annotated[float, _option(TEXT, "0: the likeliest text.", metavar="T", min=0, max=100)]
TopK = Annotated[int, _option(TEXT, "Draw from the K likeliest tokens; 0: all.", metavar="K", min=0)]
TopP = Annotated[
    float, _option(TEXT, "Draw from this share of probability; 1: all.", metavar="P", min=0, max=1)
]
Rate = Annotated[int, _option(INPUT, "Samples a second.", metavar="HZ", min=1)]
Format = Annotated[SampleFormat, typer.Option("--format", rich_help_panel=INPUT, help="Of one sample.")]
Channels = Annotated[int, _option(INPUT, "Interleaved.", metavar="N", min=1)]


def listen_command(
    files: Files = None,
    mic: Mic = False,
    demo: Demo = False,
    model: ModelName = "demo",
    realtime: Realtime = False,
    offline: Offline = False,
    text: Question = None,
    json: Json = False,
    threshold: Threshold = DecisionPolicy.threshold,
    rearm: Rearm = DecisionPolicy.rearm,
    min_gap: MinGap = DecisionPolicy.min_gap_s,
    window: Window = 60.0,
    edge: EdgeMode = Edge.reflect,
    seed: Seed = 0,
    temperature: Temperature = Sampling.temperature,
    top_k: TopK = Sampling.top_k,
    top_p: TopP = Sampling.top_p,
    rate: Rate = 16_000,
    sample_format: Format = SampleFormat.s16le,
    channels: Channels = 1,
) -> None:
    """Listen to sound, chunk by chunk of 0.4 s, and respond where a response is called for.

    Several files are several streams, one after another. On a terminal there
    is a live view, elsewhere one line per response and file; --json prints
    one object per decision, piece of a response, and file.

    \b
    Examples:
      fastloop listen --demo
      fastloop listen door.wav street.flac --json
      fastloop listen --mic --threshold 0.8 --min-gap 5
      fastloop listen clip.mp3 --offline --text "What is ringing?"
      arecord -t raw -f S16_LE -r 16000 | fastloop listen -
    """
    try:
        _check_usage(files or [], mic, demo, realtime, offline, text)
        config = SessionConfig(
            mode="offline" if offline else "online",
            user_text=text,
            edge=edge.value,
            policy=DecisionPolicy(threshold, rearm, min_gap),
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            window_s=window,
            max_queued_s=OFFLINE_SECONDS if offline else SessionConfig.max_queued_s,
        )
        from .sources import PcmFormat  # from here on torch is needed

        pcm = PcmFormat(rate, sample_format.value, channels)
        code = _listen(_sources(files or [], mic, demo), model, config, pcm, realtime, json)
    except (UsageProblem, ConfigError) as error:
        complain("listen", error)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


def _check_usage(
    files: list[str], mic: bool, demo: bool, realtime: bool, offline: bool, text: str | None
) -> None:
    """Combinations that make no sense are refused, not guessed at."""
    if bool(files) + mic + demo != 1:
        raise UsageProblem("give one of: FILE... (- for standard input), --mic, --demo; see --help")
    if files.count("-") > 1:
        raise UsageProblem("standard input (-) can be heard only once")
    if realtime and (mic or "-" in files):
        raise UsageProblem("--realtime is for files; the microphone and standard input set their own pace")
    if offline and (mic or realtime):
        raise UsageProblem("--offline takes a finished clip; leave out --mic and --realtime")
    if text is not None and not offline:
        raise UsageProblem("--text asks about a finished clip; add --offline")


def _sources(files: list[str], mic: bool, demo: bool) -> list[Source]:
    from ..checkpoint import MODELS
    from .sources import FILE, MIC, STDIN, Source

    if mic:
        return [Source(MIC, "microphone")]
    if demo:
        sounds = sorted((MODELS / "demo").glob("*.flac"))
        if not sounds:
            raise UsageProblem("--demo: this installation has no demo sound; reinstall it, or give a FILE")
        return [Source(FILE, path.name, path) for path in sounds]
    return [Source(STDIN, "-") if name == "-" else Source(FILE, name, Path(name)) for name in files]


def _listen(
    sources: list[Source], name: str, config: SessionConfig, pcm: PcmFormat, realtime: bool, json: bool
) -> int:
    """Hear every source; returns the exit code."""
    from ..audio import AudioError
    from ..checkpoint import CheckpointError, load
    from ..ops.dispatch import BackendError
    from .hearing import Hearing, too_long
    from .sources import opened

    try:
        engine = _engine(load(name), config)
    except CheckpointError as error:
        raise UsageProblem(error) from error
    output, codes, missed = _output(json, len(sources) > 1), {0}, []
    chunk_samples = engine.model.config.chunk_samples
    with _interruptible() as stop:
        for source in sources:
            try:
                with opened(source, pcm, chunk_samples, realtime) as (feed, seconds):
                    if config.mode == "offline" and (seconds or 0) > config.max_queued_s:
                        raise UsageProblem(too_long(config.max_queued_s))
                    Hearing(engine, config, feed, output, stop).run(source.name, seconds)
            except (AudioError, UsageProblem, BackendError) as error:
                codes.add(2)
                missed.append(source.name)
                complain("listen", _named(source.name, error))
            except BrokenPipeError:
                raise  # who reads our output has left: nothing more to say
            except Exception as error:
                known = isinstance(error, (FastloopError, OSError))
                if not known and engine.health()["status"] != "failed":
                    raise
                codes.add(1)
                missed.append(source.name)
                complain("listen", _named(source.name, engine.health()["reason"] or error))
            if stop.is_set():
                return 130
    if missed and len(sources) > 1:
        complain("listen", f"{len(missed)} of {len(sources)} not heard to the end: {', '.join(missed)}")
    return 1 if 1 in codes else max(codes)


def _named(name: str, error: object) -> str:
    """The error, and of which stream, unless it says so itself."""
    name = "standard input" if name == "-" else name
    return str(error) if name in str(error) else f"{name}: {error}"


def _engine(model: Model, config: SessionConfig) -> Engine:
    """An engine for one session of this configuration at a time, its KV pool just large enough."""
    from ..engine import Engine
    from ..engine.kv_cache import pages_for
    from ..engine.memory import session_pages
    from ..text import prefix_ids

    prefix = len(prefix_ids(model.config, model.tokenizer, config.mode, config.system_prompt))
    question = len(model.tokenizer.encode(config.user_text or ""))
    limits = EngineConfig(max_sessions=1)
    pages = session_pages(model.config, limits, config, (prefix, question))
    pages += pages_for(prefix, limits.page_tokens)
    return Engine(model, EngineConfig(max_sessions=1, kv_pages=pages))


def _output(json: bool, several: bool) -> Output:
    """JSON lines if asked for, the live view on a terminal that can draw it, plain lines elsewhere."""
    from .output import JsonOutput, PlainOutput

    if json:
        return JsonOutput()
    if sys.stdout.isatty() and sys.stdout.encoding.lower().startswith("utf"):
        from rich.console import Console

        from .view import LiveView

        console = Console(highlight=False)
        if not console.is_dumb_terminal:
            return LiveView(console)
    return PlainOutput(several)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the flag, so that the stream ends in order; the second one ends the program."""
    stop = threading.Event()

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
