"""The live view of `fastloop listen`: time, level and p(respond) at the bottom, responses above.

 0:04.0  [urgent] The smoke alarm is ringing.
kitchen.wav  ━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━  0:05.2 / 0:12.0
level        ██████████████████▌                           -18 dB
p(respond)   ▁▁▁▁▁▁▁▁▂█▁▁▁                                  0.013
listening, queued 0.0 s, latency 2.1 ms (Ctrl-C ends)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..config import SAMPLE_RATE
from ..events import Decision, Event, ResponseEnd, ResponseStart, ResponseText
from .hearing import Summary
from .output import ENDINGS, clock, summary_line
from .terminal import one_line

REFRESH_S = 1 / 15
QUIET_DB = -60.0  # the left end of the level meter
FALL_DB_S = 40.0  # how fast the meter falls back behind a peak
HEIGHTS = "▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉"
HISTORY = 512  # decisions kept for the sparkline
MOODS = {"urgent": "bold red", "angry": "red", "sad": "blue", "happy": "green", "surprise": "magenta"}


def level_db(block: np.ndarray) -> float:
    """Loudness of a block, float32 [S]: RMS in dB below full scale; -inf for silence."""
    power = float(np.mean(np.square(block, dtype=np.float64))) if len(block) else 0.0
    return 10 * float(np.log10(power)) if power > 0 else -float("inf")


class Wide:
    """A renderable made for the width it gets."""

    def __init__(self, render: Callable[[int], Text]) -> None:
        self.render = render

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render(options.max_width)


def meter(db: float, width: int) -> Text:
    """A bar from QUIET_DB to 0 dB, in eighths of a cell."""
    eighths = round(min(max(1 - db / QUIET_DB, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    bar = "█" * whole + (EIGHTHS[rest] if rest else "")
    style = "red" if db > -3 else "yellow" if db > -12 else "green"
    return Text(bar, style=style, no_wrap=True)


def sparkline(decisions: deque[tuple[float, bool]], width: int) -> Text:
    """The last p(respond), one cell a chunk; what became a response stands out."""
    text = Text(no_wrap=True)
    for p, respond in list(decisions)[-width:]:
        text.append(HEIGHTS[min(int(p * 8), 7)], style="bold green" if respond else "cyan")
    return text


class LiveView:
    """An `Output` for a terminal; see the module's docstring."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._drawn = 0.0
        self._reset("", None)

    def _reset(self, name: str, seconds: float | None) -> None:
        self._name, self._seconds = one_line(Path(name).name or name), seconds
        self._pushed = 0  # samples
        self._level, self._level_at = -float("inf"), 0.0
        self._decisions: deque[tuple[float, bool]] = deque(maxlen=HISTORY)
        self._t = 0.0
        self._response: str | None = None  # the text so far of the open response
        self._emotion: str | None = None
        self._queued_s = 0.0
        self._latency_ms: float | None = None

    def begin(self, name: str, seconds: float | None) -> None:
        self._reset(name, seconds)
        self._live = Live(self._render(), console=self.console, auto_refresh=False, transient=True)
        self._live.start(refresh=True)

    def sound(self, block: np.ndarray) -> None:
        now = time.monotonic()
        fallen = self._level - FALL_DB_S * (now - self._level_at)
        self._level, self._level_at = max(level_db(block), fallen), now
        self._pushed += len(block)

    def event(self, event: Event) -> None:
        self._t = event.t
        if isinstance(event, Decision):
            self._decisions.append((event.p_respond, event.decision == "respond"))
        elif isinstance(event, ResponseStart):
            self._response, self._emotion = "", event.emotion
        elif isinstance(event, ResponseText):
            self._response = (self._response or "") + event.text
        elif isinstance(event, ResponseEnd):
            self.console.print(self._line(event.t, one_line(event.text) + ENDINGS[event.reason]))
            self._response = None

    def tick(self, queued_s: float, latency_ms: float | None) -> None:
        self._queued_s, self._latency_ms = queued_s, latency_ms
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= REFRESH_S:
            self._live.update(self._render(), refresh=True)
            self._drawn = now

    def end(self, summary: Summary) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self.console.print(Text(summary_line(summary), style="dim"), soft_wrap=True)

    def _line(self, t: float, text: str) -> RenderableType:
        """A response: when, in which mood, what; long text is indented."""
        mood = (f"[{one_line(self._emotion)}] ", MOODS.get(self._emotion, "bold")) if self._emotion else ""
        table = Table.grid(padding=(0, 2))
        table.add_row(Text(f"{clock(t):>7}", style="dim", no_wrap=True), Text.assemble(mood, text))
        return table

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(max_width=max(12, self.console.width // 4), no_wrap=True)
        table.add_column(ratio=1, no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        at = self._pushed / SAMPLE_RATE
        if self._seconds:
            done = min(at, self._seconds)
            bar = ProgressBar(self._seconds, done, complete_style="cyan", finished_style="cyan")
            table.add_row(self._name, bar, f"{clock(at)} / {clock(self._seconds)}")
        else:
            table.add_row(self._name, "", clock(at))
        db = self._level
        table.add_row("level", Wide(lambda w: meter(db, w)), f"{db:.0f} dB" if db > QUIET_DB else "quiet")
        chance = f"{self._decisions[-1][0]:.3f}" if self._decisions else ""
        table.add_row("p(respond)", Wide(lambda w: sparkline(self._decisions, w)), chance)
        return Group(table, self._status())

    def _status(self) -> RenderableType:
        if self._response is not None:
            return self._line(self._t, one_line(self._response) + " …")
        latency = "" if self._latency_ms is None else f", latency {self._latency_ms:.1f} ms"
        return Text(f"listening, queued {self._queued_s:.1f} s{latency} (Ctrl-C ends)", style="dim")
