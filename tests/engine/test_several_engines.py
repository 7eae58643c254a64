"""Several engines in one process, in threads of a program that uses torch itself: none notices the others."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine
from fastloop.engine.captured_runner import CapturedRunner
from fastloop.engine.graphs import Graphs
from fastloop.engine.streams import DECODE, HostStreams
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import Script, comparable, expected, lively_policy, run_engine

LIMIT_S = 120  # only a hang reaches it
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run all at once; their results. The first error of any thread is raised here."""
    results: list[Any] = [None] * len(jobs)
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            results[place] = jobs[place]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "an engine hangs"
    if errors:
        raise errors[0]
    return results


def scripts(policy: DecisionPolicy, seed: int) -> list[Script]:
    options = SessionConfig(policy=policy, sampling=Sampling(1.0), seed=seed, max_response_tokens=6)
    return [Script(options, random_sound(4.0, seed=10 * seed + i)) for i in range(2)]


def say(model: Model, policy: DecisionPolicy, seed: int) -> list[Any]:
    with Engine(model, EngineConfig(runner="captured", page_tokens=16)) as engine:
        return [comparable(events) for events in run_engine(engine, scripts(policy, seed))]


def test_one_graph_is_captured_at_a_time() -> None:
    """CUDA refuses what a capture begins and ends with while another one is on its way."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)  # long enough for another thread to come in
        inside -= 1

    def capture() -> None:
        graphs = Graphs(torch.device("cpu"), HostStreams())
        condition = torch.ones(1, dtype=torch.int32)
        graphs.make(DECODE, work, {}, [])
        graphs.make_loop(DECODE, lambda: (work(), condition.zero_())[0], condition, {"c": condition}, [])

    together([capture] * 4)
    assert most == 1


class Dropped:
    """Part of a cycle, as an engine is; says when it is destroyed."""

    def __init__(self, told: list[str]) -> None:
        self.itself = self
        self.told = told

    def __del__(self) -> None:
        self.told.append("destroyed")


@pytest.mark.parametrize("collecting", [True, False])
def test_no_garbage_is_destroyed_by_a_capture(collecting: bool) -> None:
    """CUDA ends a capture whose thread destroys a graph. Afterwards garbage is collected as it was before."""
    graphs, condition = Graphs(torch.device("cpu"), HostStreams()), torch.ones(1, dtype=torch.int32)
    told: list[str] = []
    counts: list[tuple[int, int]] = []  # destroyed before and after each work

    def work() -> None:
        before = len(told)
        Dropped(told)
        kept = [[i] for i in range(100)]  # with a threshold of 1, any of them would begin a collection
        counts.append((before, len(told)))
        condition.fill_(len(kept) - 100)

    thresholds, before = gc.get_threshold(), gc.isenabled()
    gc.collect()
    try:
        gc.set_threshold(1, 1, 1)
        if not collecting:
            gc.disable()
        graphs.make(DECODE, work, {"c": condition}, [])
        graphs.make_loop(DECODE, work, condition, {"c": condition}, [])
        assert gc.isenabled() is collecting
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if before else gc.disable)()
    assert len(counts) == 2 and all(before == after for before, after in counts)
    gc.collect()
    assert told == ["destroyed"] * 2


def test_a_closed_engine_has_no_graphs() -> None:
    """They are gone without the garbage collector, which would find the rest of it at any later time."""
    model = random_model(small(), seed=3)
    policy = lively_policy(model)
    engine = Engine(model, EngineConfig(runner="captured", page_tokens=16))
    heard = run_engine(engine, scripts(policy, 1))
    runner = engine.runner
    assert isinstance(runner, CapturedRunner)
    perceive = runner._perceive
    graphs = [own.graph for own in runner._sets.values()] + list(perceive._encoders.values())
    graphs += [ear.graph for ear in perceive._ears.values()]
    gone = [weakref.ref(graph) for graph in graphs]
    assert len(gone) >= 3 and all(graph() for graph in gone)
    gc.disable()
    try:
        del graphs
        engine.close()
        assert not any(graph() for graph in gone)
    finally:
        gc.enable()
    engine.close()
    assert any(event.type == "response.end" for events in heard for event in events)


def test_engines_in_threads_say_what_each_says_alone() -> None:
    model = random_model(small(), seed=3)
    policy = lively_policy(model)
    said = together([lambda seed=seed: say(model, policy, seed) for seed in range(3)])
    for seed, heard in enumerate(said):
        wanted = [comparable(expected(model, script)) for script in scripts(policy, seed)]
        assert heard == wanted and any(event.type == "response.end" for events in heard for event in events)


def state_of_torch() -> dict[str, Any]:
    """What a program around an engine may rely on."""
    found = {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "benchmark": torch.backends.cudnn.benchmark,
        "environment": dict(os.environ),
    }
    if torch.cuda.is_available():
        found["cuda"] = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
        found["cuda random"] = torch.cuda.get_rng_state().tolist()
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("runner", ["eager", "captured", "auto"])
def test_nothing_of_torch_is_changed(device: str, runner: str) -> None:
    model = random_model(small(), seed=3)
    policy = lively_policy(model)
    model = model.to(device) if device != "cpu" else model
    before = state_of_torch()
    with Engine(model, EngineConfig(runner=runner, page_tokens=16)) as engine:
        heard = run_engine(engine, scripts(policy, 1))
        inside = state_of_torch()
    assert any(event.type == "response.end" for events in heard for event in events)
    assert inside == before and state_of_torch() == before


@cuda
@pytest.mark.parametrize("second", ["cuda:0", "cuda:1"])
def test_cuda_engines_in_threads_say_what_each_says_alone(second: str) -> None:
    """They capture while the others run; on one GPU, and on two."""
    if int(second[-1]) >= torch.cuda.device_count():
        pytest.skip(f"no {second}")
    model = random_model(small(), seed=3)
    policy = lively_policy(model)
    homes = ["cuda:0", second, "cuda:0", second]
    models = {home: model.to(home) for home in set(homes)}
    alone = []
    for seed, home in enumerate(homes):
        with Engine(models[home], EngineConfig(runner="eager", page_tokens=16)) as engine:
            alone.append([comparable(events) for events in run_engine(engine, scripts(policy, seed))])
    jobs = [lambda seed=seed, home=home: say(models[home], policy, seed) for seed, home in enumerate(homes)]
    assert together(jobs) == alone
    assert torch.cuda.current_device() == 0
