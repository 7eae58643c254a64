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
from .tfjp import BINS, HOP, WINDOW, Prepared, join, noise_profile, power, prepare, stft

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANGE_DB = 80.0  # from the loudest bin down to black
JOIN_LAP_S = 0.25
SHOWN = 9  # captions of a stream that fit above each other
CUT = "long silences cut"  # the step of tfjp.prepare whose sound the noise is heard in


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
    picture = axes.imshow(
        decibel - loudest,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        extent=(0, decibel.shape[1] * HOP / SAMPLE_RATE - WINDOW / SAMPLE_RATE / 2, 0, SAMPLE_RATE / 2000),
        interpolation="nearest",
    )
    bar = axes.figure.colorbar(picture, ax=axes, pad=0.01)
    bar.set_label("dB, loudest: 0", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    _labels(axes, title, "s", "kHz")


def _labels(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(across, fontsize=8, labelpad=1)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(labelsize=8)


def _noise(axes: Axes, sound: np.ndarray, profile: np.ndarray, title: str) -> None:
    """The noise that is subtracted, beside the mean of the sound: power over frequency."""
    kilohertz = np.arange(BINS) * SAMPLE_RATE / WINDOW / 1000
    decibel = 10 * np.log10(power(stft(sound)).mean(axis=0) + 1e-12)
    axes.plot(kilohertz, decibel, label="mean of the sound")
    if profile.any():
        axes.plot(kilohertz, 10 * np.log10(profile + 1e-12), label="noise, of its quietest frames")
    else:
        title += ": none, there is no pause to hear it in"
    axes.set_xlim(0, SAMPLE_RATE / 2000)
    axes.legend(fontsize=7, loc="upper right")
    axes.grid(alpha=0.3)
    _labels(axes, title, "kHz", "dB")


def _line(axes: Axes, seconds: float, label: str = "") -> None:
    axes.axvline(seconds, color="cyan", linewidth=1, label=label)
    if label:
        axes.legend(fontsize=7, loc="upper right")


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
    figure, axes = _figure(len(done.steps) + 2)
    kinds = iter(axes)
    for title, sound in done.steps.items():
        each = next(kinds)
        _spectrogram(each, sound, f"{name}: {title}, {len(sound) / SAMPLE_RATE:.2f} s")
        if title == CUT:
            _noise(next(kinds), sound, noise_profile(sound), f"{name}: noise profile")
    for edge, label in zip(done.core, ("", "core"), strict=True):
        _line(each, edge / SAMPLE_RATE, label)
    _spectrogram(axes[-1], join(done.pcm, done.pcm, lap), f"{name}: joined to itself over {JOIN_LAP_S:g} s")
    _line(axes[-1], (len(done.pcm) - lap / 2) / SAMPLE_RATE, "middle of the join")
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
        _caption(axes, turn.start_s, height + 0.07, turn.user[:24], colour)
        if turn.reply is not None and turn.answer_s is not None:
            axes.axvline(turn.answer_s, color="cyan", linewidth=0.7, linestyle=":")
            _caption(axes, turn.answer_s, 0.1, turn.reply[:32], "cyan", rotation=90)
    for colour, style, label in (
        ("cyan", "-", "to be answered"),
        ("white", "-", "to be ignored"),
        ("cyan", ":", "answer is due"),
    ):
        axes.plot([], [], color=colour, linestyle=style, label=label)
    axes.set_xlim(0, stream.seconds)
    legend = {"ncols": 3, "fontsize": 7, "facecolor": "black", "labelcolor": "white"}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, **legend)
    _save(figure, path)


def _caption(axes: Axes, x: float, y: float, text: str, colour: str, rotation: float = 0) -> None:
    """Text that can be read on any spectrogram."""
    behind = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 1.0}
    axes.text(x, y, text, color=colour, fontsize=7, rotation=rotation, clip_on=True, bbox=behind)


def inspect_clips(paths: list[Path], out: Path) -> Iterator[tuple[Path, Prepared | str]]:
    """A figure for each sound file -> (figure, what was done), or (file, what was wrong with it). Of files
    with the same name the later ones get a number.
    """
    taken: set[str] = set()
    for path in paths:
        name = next(n for n in _names(path.stem) if n not in taken)
        try:
            x = np.concatenate(list(read_audio(path)))
            taken.add(name)
            picture = out / f"{name}.png"
            yield picture, steps_figure(x, path.stem, picture)
        except AudioError as error:
            yield path, str(error)


def _names(stem: str) -> Iterator[str]:
    yield stem
    for number in itertools.count(2):
        yield f"{stem}-{number}"


def inspect_shard(shard: Path, out: Path, streams: int) -> Iterator[Path]:
    """Figures of the first streams of a shard; DataError where one of them is damaged."""

    def stop(reason: str) -> None:
        raise DataError(reason)

    for stream, pcm in itertools.islice(read_streams([shard], None, stop), streams):
        picture = out / f"{stream.id}.png"
        stream_figure(pcm, stream, picture)
        yield picture
