"""The engine itself, captured: one session's decisions from push to poll, and its text tokens, three ways;
and whether memory grows over 10,000 steps.

step by step      each step's results are read before the next one is planned
ahead             a step waits behind the one that runs; the host reads one step late
loop              the whole reply is one graph with a WHILE node; the host reads along
"""

from __future__ import annotations

import gc
import time

import torch

from fastloop.checkpoint import Model
from fastloop.config import ConfigError, small
from fastloop.engine import Engine, Session
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import random_sound
from fastloop.testing.timing import Timing

from .model import whole_model
from .record import Context, Record

VARIANTS = {
    "step by step": EngineConfig(runner="captured", max_sessions=2, ahead=False),
    "ahead": EngineConfig(runner="captured", max_sessions=2),
    "loop": EngineConfig(runner="captured", max_sessions=2, single_stream=True),
}
SILENT = SessionConfig(policy=DecisionPolicy(threshold=1.0))


GROWTH_STEPS = 10_000
GROWTH_BYTES = 1 << 20  # the smallest block, 512 bytes, left behind by each step would be more than 4 MB


def run(context: Context, record: Record) -> None:
    """Lines: decision and text token of each variant. All must say the same and give all memory back. Values:
    what memory grew by.
    """
    model, said = random_model(context), {}
    for name, config in VARIANTS.items():
        if context.left_s < 6:
            record.put(left_out_text=f"from {name!r} on: out of time")
            break
        try:
            with Engine(model, config) as engine:
                said[name] = _variant(name, engine, context, record)
                engine.close()
                engine.check()
                if engine.cache.allocator.used:
                    record.problem(f"{name}: {engine.cache.allocator.used} pages are held after closing")
        except ConfigError as error:  # no WHILE node here
            record.put(**{f"{name}_text": str(error)})
    if len({tuple(text) for text in said.values()}) > 1:
        record.problem(f"the variants say different things: {said}"[:800])
    _growth(context, record)


def _growth(context: Context, record: Record) -> None:
    """Many steps of a small model; its sessions listen, answer, forget their oldest sound and are closed."""
    model = whole_model(small(layers=1), context.device, context.dtype)
    wanted = 60 if context.dry else GROWTH_STEPS
    before = _allocated(context)
    with Engine(model, EngineConfig(runner="captured", max_sessions=4)) as engine:
        policy = DecisionPolicy(0.0, min_gap_s=2.0)
        options = SessionConfig(policy=policy, sampling=Sampling(1.0), max_response_tokens=20, window_s=4.0)
        sessions = [engine.open(options) for _ in range(4)]
        pcm, held = random_sound(model.config.chunk_seconds), (0, 0)
        for round_ in range(wanted):
            for session in sessions:
                session.push(pcm)
            engine.run_until_idle()
            for session in sessions:
                session.poll()
            if round_ % 30 == 29:
                sessions.pop(0).close()
                sessions.append(engine.open(options))
            done = engine.counters.steps
            if not held[0] and done >= wanted // 10:
                held = done, _allocated(context)
            if done >= wanted or context.left_s < 4:
                break
        grown = _allocated(context) - held[1] if held[0] else 0
        record.put(growth_steps=done, growth_from_step=held[0], growth_bytes=grown)
        record.put(growth_text=f"{grown} bytes over {done} steps")
        if grown > GROWTH_BYTES:
            record.problem(f"memory grew by {grown} bytes from step {held[0]} to step {done}")
        engine.close()
        engine.check()
    if engine.cache.allocator.used:
        record.problem(f"{engine.cache.allocator.used} pages are held after closing all sessions")
    del engine, sessions, session
    gc.collect()
    record.put(left_behind_bytes=_allocated(context) - before)


def random_model(context: Context) -> Model:
    """Random weights over a byte tokenizer; a dry run's dims have a vocabulary of bytes at least."""
    config = small(layers=1) if context.dry else context.config
    return whole_model(config, context.device, context.dtype)


def _variant(name: str, engine: Engine, context: Context, record: Record) -> list[str]:
    """Time one variant; returns what its replies said."""
    chunks, tokens = (2, 6) if context.dry else (100, 200)
    with engine.open(SILENT) as session:
        _decisions(engine, session, 3)  # captures
        timing = _decisions(engine, session, chunks)
    record.line("engine: decision, push to poll", name, timing)
    texts = []
    seconds = 0.0
    for _ in range(2):  # the first one captures
        with engine.open(talkative(tokens)) as session:
            begin = time.perf_counter()
            texts.append(_reply(engine, session))
            seconds = (time.perf_counter() - begin) / session.stream.spoken
    record.line("engine: text token", name, seconds, note=f"{tokens} tokens, one decision included")
    held = _allocated(context)
    with engine.open(talkative(tokens)) as session:
        texts.append(_reply(engine, session))
    record.put(**{f"memory growth, {name}, bytes": _allocated(context) - held})
    if _allocated(context) > held:
        record.problem(f"{name}: a reply left {_allocated(context) - held} bytes of device memory behind")
    return texts


def talkative(tokens: int) -> SessionConfig:
    """Answers its first chunk with so many tokens, unless it draws the end before."""
    return SessionConfig(
        policy=DecisionPolicy(0.0, min_gap_s=3600), sampling=Sampling(1.0), seed=1, max_response_tokens=tokens
    )


def _decisions(engine: Engine, session: Session, count: int) -> Timing:
    """Seconds from a push to its decision in the host's hands, one chunk after another."""
    pcm = random_sound(engine.model.config.chunk_seconds)
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        session.push(pcm)
        while not session.poll():
            engine.step()
        seconds.append(time.perf_counter() - begin)
    return Timing(tuple(seconds))


def _reply(engine: Engine, session: Session) -> str:
    """The text of a whole reply."""
    session.push(random_sound(engine.model.config.chunk_seconds))
    engine.run_until_idle()
    return "".join(getattr(event, "text", "") for event in session.poll())


def _allocated(context: Context) -> int:
    """Bytes of device memory in use, when the device is done."""
    if context.device != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
