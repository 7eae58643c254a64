"""How often a coarser precision decides otherwise: python bench/cpu_decisions.py SHARDS [--model demo]

Streams of the split `val` through the native engine in each precision; sessions stay silent, so that all
precisions see equal histories. A decision is p above the model's threshold; float32 is what the others are
compared with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gpu.machine import stamp

from fastloop import DecisionPolicy, Engine, EngineConfig, Model, SessionConfig, load
from fastloop.events import Decision
from fastloop.soundflow.truth import read_truth

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
SESSIONS = 16


def decisions(model: Model, sounds: Sequence[np.ndarray], engine_config: EngineConfig) -> np.ndarray:
    """p(respond) of every chunk of every sound, in order [chunks]."""
    found: list[float] = []
    for first in range(0, len(sounds), SESSIONS):
        group = sounds[first : first + SESSIONS]
        silent = SessionConfig(policy=DecisionPolicy(threshold=1.0), max_queued_s=3600.0, max_events=1 << 20)
        with Engine(model, engine_config) as engine:
            sessions = [engine.open(silent) for _ in group]
            for session, sound in zip(sessions, group, strict=True):
                session.push(sound)
                session.flush()
            engine.run_until_idle()
            for session in sessions:
                found += [event.p_respond for event in session.poll() if isinstance(event, Decision)]
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, nargs="+")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kv", default="auto", help="precision of keys and values")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sounds = [pcm for _, pcm in read_truth(given.shards, "val", print)]
    exact, rows = np.empty(0), {}
    for precision in PRECISIONS:
        config = EngineConfig(
            max_sessions=SESSIONS,
            runner="native",
            precision=precision,
            kv_precision=given.kv,
            threads=given.threads,
        )
        model = load(given.model, dtype="float32")
        p, above = decisions(model, sounds, config), model.config.threshold
        exact = exact if len(exact) else p
        rows[precision] = {
            "chunks": len(p),
            "same": float(np.mean((p > above) == (exact > above))),
            "largest_difference_of_p": float(np.abs(p - exact).max()),
        }
        print(precision, json.dumps(rows[precision]))
    if given.json:
        given.json.write_text(json.dumps(stamp() | {"decisions": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
