"""Deadlines without a GPU: many live streams against one device whose steps cost what a model says.

    python -m fastloop.engine.simulation --sessions 1000 --plot deadlines.png --json deadlines.json

Discrete events: chunks arrive every 0.4 s at random phases and late by a random jitter; the device takes one
step at a time, whose sessions the admission policy chooses (fastloop.engine.admission) and whose time the
cost model gives: bytes and FLOPs at published ceilings, not measurements. What it answers is which policy
meets which deadlines at which share of the device's capacity.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .admission import COHORT_S, ORDERS, Waiting, chunk_due, start_at, take, token_due
from .stats import percentile

CHUNK_S = 0.4
ROWS = 13  # of a listening step
CONTEXT = 2000  # positions in the cache: a window of 60 s


@dataclass(frozen=True)
class CostModel:
    """What a step costs at the 3B dimensions in bf16 on one H200, from bytes and FLOPs.

    Bandwidth: 68 % of 4.8 TB/s, the best published whole-token efficiency. Matrix peak: measured.
    """

    bytes_per_s: float = 0.68 * 4.8e12
    flops_per_s: float = 790e12
    encoder_bytes: float = 1.27e9
    decoder_bytes: float = 5.55e9
    head_bytes: float = 0.62e9
    kv_bytes: float = 36_864  # a position
    encoder_flops: float = 25.5e9  # a chunk
    decoder_flops: float = 72.1e9  # a chunk of 13 rows
    attention_flops: float = 3.8e6  # a chunk and position of context

    def step_seconds(self, sequences: int, chunks: int, tokens: int, context: int = CONTEXT) -> float:
        """A step that decides `chunks` chunks and draws `tokens` tokens, of so many sequences together."""
        rows = chunks + tokens / ROWS  # in units of a listening step
        flops = rows * (self.decoder_flops + self.attention_flops * context)
        kv = sequences * context * self.kv_bytes
        encoder = self._seconds(self.encoder_bytes, chunks * self.encoder_flops) if chunks else 0.0
        head = self._seconds(self.head_bytes, tokens * self.head_bytes) if tokens else 0.0
        return encoder + self._seconds(self.decoder_bytes + kv, flops) + head

    def _seconds(self, moved: float, flops: float) -> float:
        return max(moved / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Load:
    """What comes in. A response has `tokens` tokens on average (exponential), and there are so many that
    `responding` of all sessions answer at a time if each gets `tokens_per_s`; the report has the true share.
    """

    sessions: int = 1000
    seconds: float = 60.0
    jitter_s: float = 0.05  # each chunk is late by 0..jitter
    responding: float = 0.05
    tokens: int = 100
    tokens_per_s: float = 300.0
    seed: int = 0

    @property
    def respond_probability(self) -> float:
        """Of a decision: rate in = rate out of the share that answers."""
        seconds = self.tokens / self.tokens_per_s
        return min(1.0, self.responding / (1 - self.responding) * CHUNK_S / seconds)


@dataclass(frozen=True)
class Device:
    """How steps are made: policy, limits, costs."""

    policy: str = "deadline"
    max_rows: int = 1024
    speculative_chunks: int = 8
    cohort_s: float = COHORT_S
    cost: CostModel = field(default_factory=CostModel)


@dataclass
class Report:
    """What came out. Latency: from the moment a chunk could be decided to its decision, seconds."""

    load: Load
    device: Device
    latencies: list[float] = field(default_factory=list)
    token_gaps: list[float] = field(default_factory=list)
    missed: int = 0
    undecided: int = 0  # at the end
    busy_s: float = 0.0

    @property
    def responding(self) -> float:
        """Share of the sessions' time that went into responses."""
        return sum(self.token_gaps) / (self.load.sessions * self.load.seconds)

    @property
    def missed_share(self) -> float:
        return self.missed / max(1, len(self.latencies))

    def summary(self) -> dict[str, Any]:
        """Plain data; milliseconds."""
        latency = {f"p{q}": 1e3 * percentile(self.latencies, q) for q in (50, 99)}
        return {
            "sessions": self.load.sessions,
            "policy": self.device.policy,
            "decisions": len(self.latencies),
            "latency_ms": latency | {"max": 1e3 * max(self.latencies, default=0.0)},
            "missed": self.missed,
            "undecided": self.undecided,
            "token_ms_p99": 1e3 * percentile(self.token_gaps, 99),
            "responding": self.responding,
            "busy": self.busy_s / self.load.seconds,
        }

    def __str__(self) -> str:
        p50, p99 = (1e3 * percentile(self.latencies, q) for q in (50, 99))
        gap, busy = 1e3 * percentile(self.token_gaps, 99), self.busy_s / self.load.seconds
        return (
            f"{self.load.sessions:5} sessions, {self.device.policy:8} decisions p50 {p50:6.1f} ms, p99 "
            f"{p99:6.1f} ms, missed {self.missed} of {len(self.latencies)}, {self.undecided} not decided; "
            f"tokens p99 {gap:6.1f} ms; {self.responding:.1%} respond; busy {busy:4.0%}"
        )


@dataclass
class _Session:
    chunks: deque[float] = field(default_factory=deque)  # arrivals, seconds
    freed: float = 0.0  # when the last response ended
    tokens_left: int = 0
    last_token: float = 0.0

    def waiting(self, key: int, most_chunks: int) -> Waiting | None:
        if self.tokens_left:
            since = self.chunks[0] if self.chunks else 0.0  # as Stream.ready_since
            return Waiting(key, since, self.last_token, token_due(self.last_token), speaks=True)
        if not self.chunks:
            return None
        first = self.chunks[0]
        rows = ROWS * min(len(self.chunks), most_chunks)
        return Waiting(key, first, max(first, self.freed), chunk_due(first, self.freed, CHUNK_S), rows=rows)


def simulate(load: Load, device: Device | None = None) -> Report:
    """Run a load against a device."""
    return _Simulation(load, device or Device()).run()


class _Simulation:
    def __init__(self, load: Load, device: Device) -> None:
        self.load, self.device = load, device
        self.random = random.Random(load.seed)
        self.report = Report(load, device)
        self.sessions = [_Session() for _ in range(load.sessions)]
        self.active: set[int] = set()  # sessions with something to do
        self.step_seconds = 0.0
        self.arrivals = sorted(self._arrivals())
        self.next = 0  # the first arrival that is not queued yet

    def _arrivals(self) -> list[tuple[float, int]]:
        found = []
        for key in range(self.load.sessions):
            phase, late = self.random.uniform(0, CHUNK_S), 0.0
            for number in range(int(self.load.seconds / CHUNK_S)):
                due = phase + number * CHUNK_S
                late = max(late, due + self.random.uniform(0, self.load.jitter_s))  # in order
                found.append((late, key))
        return found

    def run(self) -> Report:
        now = 0.0
        while now < self.load.seconds:
            self._arrive(now)
            waiting = self._waiting()
            if not waiting:
                if self.next == len(self.arrivals):
                    break
                now = self.arrivals[self.next][0]
                continue
            begin = start_at(waiting, now, self.device.cohort_s)
            if begin > now:
                coming = self.arrivals[self.next][0] if self.next < len(self.arrivals) else begin
                now = min(begin, coming)
                continue
            order = ORDERS[self.device.policy](waiting, now, self.step_seconds)
            now = self._step(take(order, self.device.max_rows), now)
        self.report.undecided = sum(len(s.chunks) for s in self.sessions)
        return self.report

    def _arrive(self, now: float) -> None:
        while self.next < len(self.arrivals) and self.arrivals[self.next][0] <= now:
            arrived, key = self.arrivals[self.next]
            self.sessions[key].chunks.append(arrived)
            self.active.add(key)
            self.next += 1

    def _waiting(self) -> list[Waiting]:
        most = self.device.speculative_chunks
        found = (self.sessions[key].waiting(key, most) for key in self.active)
        return [w for w in found if w is not None]

    def _step(self, taken: list[Waiting], now: float) -> float:
        """Run one step; returns its end."""
        chunks = sum(w.rows // ROWS for w in taken if not w.speaks)
        tokens = sum(w.speaks for w in taken)
        self.step_seconds = self.device.cost.step_seconds(len(taken), chunks, tokens)
        end = now + self.step_seconds
        for w in sorted(taken, key=lambda w: w.key):
            if w.speaks:
                self._speak(self.sessions[w.key], end)
            else:
                self._decide(self.sessions[w.key], w.rows // ROWS, end)
            if not self.sessions[w.key].tokens_left and not self.sessions[w.key].chunks:
                self.active.discard(w.key)
        self.report.busy_s += self.step_seconds
        return end

    def _speak(self, session: _Session, end: float) -> None:
        self.report.token_gaps.append(end - session.last_token)
        session.last_token = end
        session.tokens_left -= 1
        if not session.tokens_left:
            session.freed = end

    def _decide(self, session: _Session, count: int, end: float) -> None:
        """Up to `count` chunks: what follows a response in the same step is void and stays queued."""
        for _ in range(count):
            arrived = session.chunks.popleft()
            self.report.latencies.append(end - max(arrived, session.freed))
            self.report.missed += end > chunk_due(arrived, session.freed, CHUNK_S)
            if self.random.random() < self.load.respond_probability:
                session.tokens_left = 1 + int(self.random.expovariate(1 / max(1, self.load.tokens - 1)))
                session.last_token = end
                return


def plot(reports: Sequence[Report], picture: Path) -> None:
    """Latency of decisions as a share of chunks that took longer, one curve for each report; a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for report in reports:
        ordered = [1e3 * value for value in sorted(report.latencies)]
        share = [1 - i / len(ordered) for i in range(len(ordered))]
        label = f"{report.load.sessions} sessions, {report.device.policy}: missed {report.missed_share:.2%}"
        axes.plot(ordered, share, label=label)
    axes.axvline(1e3 * CHUNK_S, color="black", linestyle=":", label="due")
    axes.set(xscale="log", yscale="log", xlabel="decision latency, ms", ylabel="share of chunks above it")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def write(reports: Sequence[Report], path: Path) -> None:
    """What the simulation gave, with what it is a simulation of."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    content = {
        "device": "none: simulated, by the cost model of one H200 at the 3B dims in bfloat16",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "command": " ".join(["python -m fastloop.engine.simulation", *sys.argv[1:]]),
        "cost_model": asdict(CostModel()),
        "load": asdict(reports[0].load),
        "runs": [report.summary() for report in reports],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastloop.engine.simulation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sessions", type=int, nargs="+", default=[1000], help="how many live streams")
    parser.add_argument("--seconds", type=float, default=60.0, help="of sound")
    parser.add_argument("--responding", type=float, default=0.05, help="share of sessions that answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="a PNG of the latencies")
    parser.add_argument("--json", type=Path, help="the results")
    options = parser.parse_args()
    reports = []
    for count in options.sessions:
        load = Load(count, options.seconds, responding=options.responding, seed=options.seed)
        for policy in ORDERS:
            reports.append(simulate(load, Device(policy)))
            print(reports[-1], flush=True)
    if options.plot is not None:
        plot(reports, options.plot)
    if options.json is not None:
        write(reports, options.json)


if __name__ == "__main__":
    main()
