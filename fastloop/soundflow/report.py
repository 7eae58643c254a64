"""What a run leaves to read: a CSV of losses, a plot of them, a line or a bar with the time left."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .objective import LOSSES

COLUMNS = ("step", "rate", "seconds", *LOSSES)
LINE_EVERY = 10  # steps between lines where there is no terminal


class LossLog:
    """`log.csv` of a run, one row a step; a run that resumes at `step` cuts what came after it."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_log(path) if row["step"] <= step] if step and path.exists() else []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)
        for row in kept:
            self._writer.writerow([self._shown(row[name]) for name in COLUMNS])
        self._file.flush()

    def write(self, step: int, rate: float, seconds: float, losses: Sequence[float]) -> None:
        self._writer.writerow([self._shown(value) for value in (step, rate, seconds, *losses)])
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _shown(value: float) -> str:
        return str(int(value)) if float(value).is_integer() else repr(float(value))


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a `log.csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def smoothed(values: Sequence[float], factor: float = 0.97) -> list[float]:
    """Exponential moving average without start bias; NaN is passed over."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        if not math.isnan(value):
            total, weight = factor * total + (1 - factor) * value, factor * weight + 1 - factor
        found.append(total / weight if weight else math.nan)
    return found


def plot_losses(log: Path, picture: Path) -> None:
    """log.csv -> a PNG: losses on a logarithmic scale, and the share of wrong decisions below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = read_log(log)
    steps = [row["step"] for row in rows]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for name in ("total", "control", "text", "heard", "recognised", "recalled"):
        values = [row[name] for row in rows]
        if any(value > 0 for value in values):  # a loss without weight is not computed: no curve, no label
            top.plot(steps, smoothed(values), label=name)
    for name, shown in (("silent_right", "false triggers"), ("respond_right", "missed answers")):
        wrong = smoothed([1 - row[name] for row in rows])
        bottom.plot(steps, [max(value, 1e-5) for value in wrong], label=shown)
    for axes in (top, bottom):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    top.set_ylabel("cross-entropy, nats")
    top.set_title("means over about 30 steps", loc="left", fontsize=9)
    bottom.set_ylabel("wrong decisions, share of their chunks")
    bottom.set_xlabel("step")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


class Ticker:
    """Progress of a run on standard error: a bar on a terminal, else a line every few steps."""

    def __init__(self, first: int, steps: int) -> None:
        self.first, self.steps = first, steps
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True)) if sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=first)

    def show(self, step: int, seconds: float, losses: Sequence[float]) -> None:
        """After `step` steps; seconds: since this process began with step `first`."""
        parts = [f"{name} {value:.4f}" for name, value in zip(LOSSES, losses, strict=True)]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description="  ".join(parts[:3]))
        elif step % LINE_EVERY == 0 or step == self.steps:
            left = seconds / max(1, step - self.first) * (self.steps - step)
            line = "  ".join([f"step {step}/{self.steps}", *parts, f"{left / 60:.1f} min left"])
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
