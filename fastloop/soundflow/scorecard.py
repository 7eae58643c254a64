"""Evaluations as files and pictures: JSON, predictions, PNG; and the table that the command prints."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .evaluate import Outcome, Scores
from .statistics import Figure


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences -> JSON data; NaN becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """JSON lines."""
    text = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def outcome_row(outcome: Outcome) -> dict[str, Any]:
    """One stream: what every turn got, and the false triggers."""
    turns = [
        {"label": turn.label, "start_s": turn.start_s, "end_s": turn.end_s, "wanted": turn.reply, "got": unit}
        for turn, unit in outcome.answered
    ]
    return {
        "id": outcome.stream.id,
        "seconds": outcome.stream.seconds,
        "turns": turns,
        "false": outcome.false,
    }


def figures_table(title: str, figures: Mapping[str, Figure]) -> Table:
    """Name, value, 95 % interval, count."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, where in (("", "left"), ("value", "right"), ("95 % interval", "right"), ("n", "right")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    for name, figure in figures.items():
        if figure.n == 0:
            table.add_row(name.replace("_", " "), "-", "", "0")
            continue
        interval = f"{figure.low:.3f} .. {figure.high:.3f}"
        table.add_row(name.replace("_", " "), f"{figure.value:.3f}", interval, str(figure.n))
    return table


def plot_streams(scores: Scores, outcomes: Sequence[Outcome], path: Path) -> None:
    """Recall and right words by label, share of quiet clips by silent label, latencies."""
    pyplot = _pyplot()
    height = 2 + 0.22 * max(len(scores.recall), len(scores.silence), 8)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, height), layout="constrained")
    _bars(left, scores.recall, "answered", offset=0.2)
    _bars(left, scores.right, "with the right words", offset=-0.2)
    left.set_title("to be answered")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    _bars(middle, scores.silence, "no false trigger", offset=0.0)
    middle.set_title("to be ignored: clips that stayed silent")
    delays = [
        (unit.t_s - turn.start_s, unit.t_s - turn.end_s)
        for outcome in outcomes
        for turn, unit in outcome.answered
        if unit is not None
    ]
    for k, name in enumerate(("from onset", "from end")):
        right.hist([pair[k] for pair in delays], bins=40, range=(-4, 4), alpha=0.6, label=name)
    right.set_title("latency of answers")
    right.set_xlabel("seconds, from onset or from end of the sound")
    right.set_ylabel("answers")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_proactive(found: Mapping[str, Mapping[str, Figure]], path: Path) -> None:
    """Accuracy of the decision by domain and by folder."""
    pyplot = _pyplot()
    rows = {**found["overall"], **found["decision"], **found["domain"], **found["folder"]}
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.28 * len(rows)), layout="constrained")
    _bars(axes, rows, "right decisions", offset=0.0, shown="share of right decisions")
    axes.set_ylim(0.4, len(rows) + 0.6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_offline(scores: Mapping[str, Mapping[str, Figure]], path: Path) -> None:
    """A panel for each figure, a bar for each group; at most three panels beside each other."""
    pyplot = _pyplot()
    shown = {name: groups for name, groups in scores.items() if any(f.n for f in groups.values())}
    rows = max((len(groups) for groups in shown.values()), default=1)
    across = min(max(len(shown), 1), 3)
    down = max(-(-len(shown) // across), 1)
    size = (5 * across, (1.5 + 0.28 * rows) * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    for panel, (name, groups) in zip(axes.flat, shown.items(), strict=False):
        _bars(panel, groups, name, offset=0.0, shown="")
        panel.set_title(name.replace("_", " "))
        panel.set_xlim(0, 1.02 * max(1.0, *(f.high for f in groups.values() if f.n)))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _bars(axes: Any, figures: Mapping[str, Figure], label: str, offset: float, shown: str = "share") -> None:
    """Horizontal bars with intervals, the first figure on top; shown: what the axis says."""
    names = [name for name, figure in figures.items() if figure.n]
    places = [len(names) - i + offset for i in range(len(names))]
    values = [figures[name].value for name in names]
    spread = [
        [figures[name].value - figures[name].low for name in names],
        [figures[name].high - figures[name].value for name in names],
    ]
    axes.barh(places, values, height=0.38 if offset else 0.7, xerr=spread, label=label, ecolor="gray")
    axes.set_yticks(places, [f"{name.replace('_', ' ')} ({figures[name].n})" for name in names])
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(f"{shown}, with its 95 % interval".removeprefix(", "))
