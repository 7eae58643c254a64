"""The peak memory of the published dims on a CPU, loading included: python bench/cpu_memory.py

Writes a checkpoint of random weights (unless --checkpoint names one that is there), then loads it in a
process of its own, opens an engine, lets one session hear some sound, and prints the peak of that process's
memory beside what weights and keys and values take. The bar: 1.15 times that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastloop import stored
from fastloop.checkpoint import load, write_checkpoint
from fastloop.engine import Engine
from fastloop.engine.native_runner import NativeRunner
from fastloop.options import EngineConfig, SessionConfig
from fastloop.quantise import GROUPS, Quantised
from fastloop.testing.cases import byte_tokenizer, random_sound
from fastloop.testing.cpu_bench import SIZES, RandomWeights


def write(directory: Path, size: str, precision: str) -> None:
    """A checkpoint of random weights, one tensor in memory at a time."""
    config = SIZES[size]()
    weights = RandomWeights(config, precision)
    kept = {name: stored.precision_of(name, shape, precision) for name, shape in weights.shapes.items()}
    kinds = stored.kinds_of(weights.shapes, {n: p for n, p in kept.items() if p}, torch.bfloat16, GROUPS[0])

    def tensors():  # type: ignore[no-untyped-def]
        for name in weights.shapes:
            weight = weights[name]
            yield from stored.parts(weight) if isinstance(weight, Quantised) else (weight.bfloat16(),)

    write_checkpoint(directory, config, kinds, tensors(), byte_tokenizer(512).to_json())


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(directory: Path, kv_precision: str, seconds: float) -> dict[str, float]:
    """Bytes, in this process."""
    before = status("VmHWM")
    model = load(directory)
    engine = Engine(model, EngineConfig(max_sessions=1, kv_precision=kv_precision))
    loaded = status("VmHWM")
    session = engine.open(SessionConfig(max_queued_s=600.0))
    session.push(random_sound(seconds))
    engine.run_until_idle()
    assert isinstance(engine.runner, NativeRunner)
    kv = len(session.stream.kv.table) * engine.cache.page_bytes
    weights = engine.runner.packed.nbytes + model.decoder.embedding.nbytes
    peak = status("VmHWM")
    return {
        "python": before,
        "loaded": loaded,
        "peak": peak,
        "weights": weights,
        "kv": kv,
        "ratio": peak / (weights + kv),
        "ratio_without_python": (peak - before) / (weights + kv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--precision", choices=("int8", "int4"), default="int4")
    parser.add_argument("--kv", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="of sound")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(measure(given.checkpoint, given.kv, given.seconds)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.checkpoint or Path(scratch) / "model"
        if not directory.exists():
            write(directory, given.size, given.precision)
        command = [sys.executable, __file__, "--inside", "--checkpoint", str(directory), "--kv", given.kv]
        out = subprocess.run(
            [*command, "--seconds", str(given.seconds)], check=True, capture_output=True, text=True
        )
        for name, value in json.loads(out.stdout).items():
            print(f"{name:<22}" + (f"{value:.3f}" if "ratio" in name else f"{value / 1e9:.3f} GB"))


if __name__ == "__main__":
    main()
