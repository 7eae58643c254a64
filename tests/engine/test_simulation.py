"""The policy in simulation: deadlines that can be met are, fewer are missed than by FIFO, nobody starves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastloop.engine import simulation
from fastloop.engine.admission import COHORT_S, FLOOR_TOKENS_PER_S, ORDERS, Waiting
from fastloop.engine.simulation import CHUNK_S, CostModel, Device, Load, Report, simulate
from fastloop.engine.stats import percentile

CAPACITY = 3000  # sessions that keep the device of the cost model just busy; see test_capacity
BRIEF_S = 3.0  # of sound


@pytest.fixture(scope="module")
def overload() -> dict[str, Report]:
    load = Load(int(1.2 * CAPACITY), 2.0)
    return {policy: simulate(load, Device(policy)) for policy in ("fifo", "deadline")}


@pytest.mark.parametrize(
    ("listeners", "context", "floor_ms"),
    [(1, 0, 1.42), (1, 4096, 1.45), (8, 4096, 1.9), (64, 4096, 8.5), (256, 4096, 34), (1024, 4096, 134)],
)
def test_cost_model_gives_the_floors(listeners: int, context: int, floor_ms: float) -> None:
    """At nominal bandwidth, the published arithmetic for batches of listeners, within its own rounding."""
    cost = CostModel(bytes_per_s=4.8e12)
    assert cost.step_seconds(listeners, listeners, 0, context) * 1e3 == pytest.approx(floor_ms, rel=0.15)


def test_capacity() -> None:
    """A full step of listeners each, over and over: what CAPACITY stands for."""
    chunks = 1024 // 13
    per_chunk = CostModel().step_seconds(chunks, chunks, 0) / chunks
    assert CHUNK_S / per_chunk == pytest.approx(CAPACITY, rel=0.05)


@pytest.mark.parametrize("policy", ["fifo", "deadline"])
def test_at_half_load_no_deadline_is_missed(policy: str) -> None:
    report = simulate(Load(CAPACITY // 2, BRIEF_S), Device(policy))
    assert len(report.latencies) > 10_000
    assert report.missed == 0
    assert percentile(report.latencies, 99) < 0.1


@pytest.mark.parametrize("policy", ["fifo", "deadline"])
def test_a_thousand_live_streams(policy: str) -> None:
    """The product's claim in the cost model: 5 % of them answered, p99 within 100 ms, no deadline missed."""
    report = simulate(Load(1000, 5.0, responding=0.05), Device(policy))
    assert report.load.sessions == 1000 and len(report.latencies) > 11_000
    assert report.missed == 0 and percentile(report.latencies, 99) <= 0.1
    assert 0.04 < report.responding < 0.08


def test_a_burst_is_worked_off_in_the_order_of_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 chunks at once and 1,500 sessions as usual: all can be decided in time, and are; not if whoever
    comes last goes first.
    """
    burst, usual = 2000, CAPACITY // 2
    steady = simulation._Simulation(Load(usual, 2.0, responding=0.0), Device())._arrivals()
    arrivals = [(0.0, usual + i) for i in range(burst)] + steady
    monkeypatch.setattr(simulation._Simulation, "_arrivals", lambda self: arrivals)
    load = Load(usual + burst, 2.0, responding=0.0)
    report = simulate(load, Device("deadline"))
    assert len(report.latencies) + report.undecided > burst + 4 * usual and report.missed == 0
    assert max(report.latencies) > 0.5 * CHUNK_S, "not a burst"

    def latest(waiting: list[Waiting], now: float, step_seconds: float) -> list[Waiting]:
        return sorted(waiting, key=lambda w: (-w.due, w.key))

    monkeypatch.setitem(ORDERS, "deadline", latest)
    assert simulate(load, Device("deadline")).missed > 0


@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("seed", [1, 2])
def test_deadline_misses_no_more_than_fifo(share: float, seed: int) -> None:
    load = Load(int(share * CAPACITY), 3.0, seed=seed)
    fifo, deadline = (simulate(load, Device(policy)) for policy in ("fifo", "deadline"))
    assert deadline.missed <= fifo.missed


def test_in_overload_deadline_misses_fewer(overload: dict[str, Report]) -> None:
    fifo, deadline = overload["fifo"], overload["deadline"]
    assert fifo.missed > 0, "not an overload"
    assert deadline.missed < fifo.missed


def test_no_response_starves(overload: dict[str, Report]) -> None:
    """Under more load than the device has capacity for, every token comes at the floor rate or faster."""
    device = Device()
    longest = device.cost.step_seconds(1024, 1024 // 13, 1024)
    gaps = overload["deadline"].token_gaps
    assert len(gaps) > 1000
    assert max(gaps) <= 1 / FLOOR_TOKENS_PER_S + longest
    assert max(overload["fifo"].token_gaps) > max(gaps)


def test_a_lone_stream_never_waits_for_a_tick() -> None:
    report = simulate(Load(1, 20.0, responding=0.0))
    step = CostModel().step_seconds(1, 1, 0)
    assert len(report.latencies) == 50
    assert max(report.latencies) == pytest.approx(COHORT_S + step)


def test_every_chunk_is_decided_or_still_queued() -> None:
    load = Load(200, 5.0)
    report = simulate(load)
    chunks = load.sessions * int(load.seconds / CHUNK_S)
    never_arrived = chunks - len(report.latencies) - report.undecided
    assert 0 <= never_arrived <= load.sessions  # those due in the last 0.4 s
    assert 0 < report.responding < 0.1
    assert simulate(load).latencies == report.latencies, "a seed is a run"


def test_command_prints_and_plots(tmp_path: Path) -> None:
    picture, results = tmp_path / "latencies.png", tmp_path / "latencies.json"
    command = [sys.executable, "-m", "fastloop.engine.simulation", "--sessions", "20", "40"]
    done = subprocess.run(
        [*command, "--seconds", "2", "--plot", str(picture), "--json", str(results)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("missed 0 of" in line for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = json.loads(results.read_text())
    assert told["device"].startswith("none: simulated") and told["cost_model"]["decoder_bytes"] == 5.55e9
    assert [(r["sessions"], r["policy"]) for r in told["runs"]] == [
        (n, policy) for n in (20, 40) for policy in ("fifo", "deadline")
    ]
    assert all(0 < r["latency_ms"]["p50"] <= r["latency_ms"]["p99"] <= 100 for r in told["runs"])
