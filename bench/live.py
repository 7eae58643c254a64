"""Live sessions on one core: python bench/live.py [--sessions 250] [--seconds 20] [--model NAME|DIR]

Every session gets a chunk of sound every 0.4 s, each at its own time, as from as many microphones; windows
are full (60 s) before the clock starts. Latency is from the moment a chunk is due to its decision in `poll`.
Duty cycle: all sessions speak to the engine all the time, none is answered.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from fastloop import DecisionPolicy, Engine, EngineConfig, SessionConfig, load
from fastloop.events import Decision
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.cpu_bench import nano


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--model", help="a packaged model or a directory; without it, random weights of 7 M")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=208, help="rows of a step at most")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load(given.model) if given.model else random_model(nano())
    precision = "auto" if model.precision else given.precision
    config = EngineConfig(
        max_sessions=given.sessions,
        precision=precision,
        threads=given.threads,
        max_step_rows=given.rows,
        max_perceive_chunks=32,
    )
    engine = Engine(model, config)
    silent = SessionConfig(policy=DecisionPolicy(threshold=1.0), speculative_chunks=4)
    sessions = [engine.open(silent) for _ in range(given.sessions)]
    chunk, seconds = model.config.chunk_samples, model.config.chunk_seconds
    sound = random_sound(60.0)
    for session in sessions:  # full windows
        for half in (sound[: len(sound) // 2], sound[len(sound) // 2 :]):
            session.push(half)
            engine.run_until_idle()
        session.poll()
    offsets = np.random.default_rng(0).uniform(0, seconds, given.sessions)
    rounds = round(given.seconds / seconds)
    due = sorted((float(offset) + k * seconds, i) for i, offset in enumerate(offsets) for k in range(rounds))
    arrived: list[list[float]] = [[] for _ in sessions]
    latencies: list[float] = []
    busy, at = 0.0, 0
    start = time.perf_counter()
    while at < len(due) or any(arrived):
        now = time.perf_counter() - start
        while at < len(due) and due[at][0] <= now:
            when, i = due[at]
            sessions[i].push(sound[:chunk])
            arrived[i].append(when)
            at += 1
        begun = time.perf_counter()
        worked = engine.step()
        after = time.perf_counter()
        if worked:
            busy += after - begun
        elif at < len(due):
            time.sleep(max(0.0, min(0.002, due[at][0] - (after - start))))
        for i in [i for i, waiting in enumerate(arrived) if waiting]:
            decided = sum(isinstance(event, Decision) for event in sessions[i].poll())
            latencies += [float(after - start - when) for when in arrived[i][:decided]]
            del arrived[i][:decided]
    wall = time.perf_counter() - start
    p50, p99, worst = (float(np.percentile(latencies, q)) * 1e3 for q in (50, 99, 100))
    result = {
        "sessions": given.sessions,
        "threads": given.threads,
        "precision": model.precision or precision,
        "model": model.config.name,
        "seconds": wall,
        "decisions": len(latencies),
        "latency_ms": {"p50": p50, "p99": p99, "max": worst},
        "missed": int(sum(t > seconds for t in latencies)),
        "busy": float(busy / wall),
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
