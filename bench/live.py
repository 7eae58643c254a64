"""Live sessions: python bench/live.py [--sessions 250] [--seconds 20] [--device cuda] [--model NAME|DIR]

Every session gets a chunk of sound every 0.4 s, each at its own time, as from as many microphones; windows
are full (60 s) before the clock starts. Latency is from the moment a chunk is due to its decision in `poll`.
Duty cycle: all sessions speak to the engine all the time; --responding of them are being answered, none
unless it is given. On a GPU: the captured runner, once through small and large steps before the clock starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from gpu.machine import stamp
from gpu.model import whole_model

from fastloop import Engine, EngineConfig, load
from fastloop.checkpoint import Model
from fastloop.config import published_3b
from fastloop.testing.cases import random_model
from fastloop.testing.cpu_bench import nano
from fastloop.testing.live import Load, populate, run_live, warm_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--model", help="a packaged model or a directory; without it, random weights")
    parser.add_argument("--size", choices=("nano", "3b"), default="nano", help="of random weights: 7 M, 3 B")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", default="int8", help="of the weights, on a CPU")
    parser.add_argument("--kv", default="auto", help="keys and values (EngineConfig.kv_precision)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, help="rows of a step at most (208; 1,024 on a GPU)")
    parser.add_argument("--responding", type=float, default=0.0, help="share of the sessions being answered")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    model, config = model_of(given, device), engine_config(given, device)
    if device.type == "cpu":
        precision = "auto" if model.precision else given.precision
        config = dataclasses.replace(config, precision=precision, threads=given.threads)
    live = Load(given.seconds, responding=given.responding)
    engine = Engine(model, config)
    sessions = populate(engine, live, given.sessions)
    if device.type == "cuda":
        warm_up(engine, sessions, live)
    result = stamp(device.type) | {
        "model": model.config.name,
        "precision": model.precision or (config.precision if device.type == "cpu" else str(model.dtype)),
        "kv": str(engine.cache.k_pages.dtype).removeprefix("torch."),
        "threads": given.threads,
    }
    result |= run_live(engine, sessions, live).summary()
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


def model_of(given: argparse.Namespace, device: torch.device) -> Model:
    if given.model:
        return load(given.model, device=given.device)
    config = published_3b() if given.size == "3b" else nano()
    if device.type == "cpu":
        return random_model(config)
    return whole_model(config, given.device, torch.bfloat16)


def engine_config(given: argparse.Namespace, device: torch.device) -> EngineConfig:
    kept = {"max_sessions": given.sessions, "kv_precision": given.kv}
    if device.type == "cpu":
        return EngineConfig(**kept, max_step_rows=given.rows or 208, max_perceive_chunks=32)
    return EngineConfig(**kept, max_step_rows=given.rows or 1024, runner="captured", admission="deadline")


if __name__ == "__main__":
    main()
