"""Figures to look at: what each step of TFJP does to a clip, and what a stream holds when."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..audio.files import read as read_audio
from ..audio.pcm import AudioError
from ..config import SAMPLE_RATE
from .clips import DataError
from .shards import Stream, read_streams
from .tfjp import HOP, WINDOW, Prepared, join, power, prepare, stft

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANGE_DB = 80.0  # from the loudest bin down to black
JOIN_LAP_S = 0.25
SHOWN = 9  # captions of a stream that fit above each other


def _figure(rows: int, width: float = 11.0) -> tuple[Figure, list[Axes]]:
    try:
        import matplotlib
    except ImportError:
        raise DataError(
            "figures are drawn with matplotlib: install it (pip install 'fastloop[train]')"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, 1, figsize=(width, 2.1 * rows), squeeze=False, layout="constrained")
    return figure, list(axes[:, 0])


def _spectrogram(axes: Axes, x: np.ndarray, title: str) -> None:
    decibel = 10 * np.log10(power(stft(x)).T + 1e-12)
    loudest = float(decibel.max())
    axes.imshow(
        decibel,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=loudest - RANGE_DB,
        vmax=loudest,
        extent=(0, decibel.shape[1] * HOP / SAMPLE_RATE - WINDOW / SAMPLE_RATE / 2, 0, SAMPLE_RATE / 2000),
        interpolation="nearest",
    )
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_ylabel("kHz", fontsize=8)
    axes.tick_params(labelsize=8)


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90, metadata={"Software": None})
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from error
    finally:
        plt.close(figure)
    return path


def steps_figure(x: np.ndarray, name: str, path: Path) -> Prepared:
    """All steps of TFJP on a clip, float [S], and its join to itself, as spectrograms in one picture."""
    done = prepare(x)
    lap = min(round(JOIN_LAP_S * SAMPLE_RATE), len(done.pcm) // 2)
    figure, axes = _figure(len(done.steps) + 1)
    for each, (title, sound) in zip(axes, done.steps.items(), strict=False):
        _spectrogram(each, sound, f"{name}: {title}, {len(sound) / SAMPLE_RATE:.2f} s")
    for edge in done.core:
        axes[-2].axvline(edge / SAMPLE_RATE, color="cyan", linewidth=1)
    _spectrogram(axes[-1], join(done.pcm, done.pcm, lap), f"{name}: joined to itself over {JOIN_LAP_S:g} s")
    axes[-1].axvline((len(done.pcm) - lap / 2) / SAMPLE_RATE, color="cyan", linewidth=1)
    axes[-1].set_xlabel("s", fontsize=8)
    _save(figure, path)
    return done


def stream_figure(pcm: np.ndarray, stream: Stream, path: Path) -> None:
    """A stream, float [S], with its turns: ignored ones in white, answered ones in cyan, with a dotted line
    where the answer is due.
    """
    figure, (axes,) = _figure(1, width=18.0)
    figure.set_figheight(4.5)
    _spectrogram(axes, pcm, f"{stream.id}: {stream.sub_task}, {stream.scene}")
    for number, turn in enumerate(stream.turns):
        height = SAMPLE_RATE / 2000 * (1 - (number % SHOWN + 1) / (SHOWN + 1) * 0.7)
        colour = "white" if turn.reply is None else "cyan"
        axes.plot([turn.start_s, turn.end_s], [height, height], color=colour, linewidth=1.5)
        axes.text(turn.start_s, height + 0.05, turn.user[:24], color=colour, fontsize=7, clip_on=True)
        if turn.reply is not None and turn.answer_s is not None:
            axes.axvline(turn.answer_s, color="cyan", linewidth=0.7, linestyle=":")
            axes.text(turn.answer_s, 0.1, turn.reply[:32], color="cyan", fontsize=6, rotation=90)
    axes.set_xlabel("s", fontsize=8)
    _save(figure, path)


def inspect_clips(paths: list[Path], out: Path) -> Iterator[tuple[Path, Prepared | str]]:
    """A figure for each sound file -> (figure, what was done), or (file, what was wrong with it)."""
    for path in paths:
        try:
            x = np.concatenate(list(read_audio(path)))
            picture = out / f"{path.stem}.png"
            yield picture, steps_figure(x, path.stem, picture)
        except AudioError as error:
            yield path, str(error)


def inspect_shard(shard: Path, out: Path, streams: int) -> Iterator[Path]:
    """Figures of the first streams of a shard; DataError where one of them is damaged."""

    def stop(reason: str) -> None:
        raise DataError(reason)

    for stream, pcm in itertools.islice(read_streams([shard], None, stop), streams):
        picture = out / f"{stream.id}.png"
        stream_figure(pcm, stream, picture)
        yield picture
