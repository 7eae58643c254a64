"""The engine itself, captured: one session's decisions from push to poll, and its text tokens, three ways.

step by step      each step's results are read before the next one is planned
ahead             a step waits behind the one that runs; the host reads one step late
loop              the whole reply is one graph with a WHILE node; the host reads along
"""

from __future__ import annotations

import contextlib
import time

import torch

from fastloop.checkpoint import Model
from fastloop.config import ConfigError, small
from fastloop.decoder import decoder_shapes
from fastloop.encoder import encoder_shapes
from fastloop.engine import Engine, Session
from fastloop.options import DecisionPolicy, EngineConfig, Sampling, SessionConfig
from fastloop.testing.cases import byte_tokenizer, random_sound
from fastloop.testing.timing import Timing

from .model import backend, random_weights
from .record import Context, Record

VARIANTS = {
    "step by step": EngineConfig(runner="captured", max_sessions=2, ahead=False),
    "ahead": EngineConfig(runner="captured", max_sessions=2),
    "loop": EngineConfig(runner="captured", max_sessions=2, single_stream=True),
}
SILENT = SessionConfig(policy=DecisionPolicy(threshold=1.0))


def run(context: Context, record: Record) -> None:
    """Lines: decision and text token of each variant. All must say the same and give all memory back."""
    model, said = random_model(context), {}
    for name, config in VARIANTS.items():
        if context.left_s < 6:
            record.put(left_out_text=f"from {name!r} on: out of time")
            break
        try:
            with ours(context), Engine(model, config) as engine:
                said[name] = _variant(name, engine, context, record)
                engine.close()
                engine.check()
                if engine.cache.allocator.used:
                    record.problem(f"{name}: {engine.cache.allocator.used} pages are held after closing")
        except ConfigError as error:  # no WHILE node here
            record.put(**{f"{name}_text": str(error)})
    if len({tuple(text) for text in said.values()}) > 1:
        record.problem(f"the variants say different things: {said}"[:800])


def ours(context: Context) -> contextlib.AbstractContextManager[None]:
    """Our kernels; in a dry run what the CPU has, for the interpreter's cannot be recorded."""
    return contextlib.nullcontext() if context.dry else backend("triton", context)


def random_model(context: Context) -> Model:
    """Random weights over a byte tokenizer; a dry run's dims have a vocabulary of bytes at least."""
    config = small(layers=1) if context.dry else context.config
    shapes = encoder_shapes(config) | decoder_shapes(config)
    weights = random_weights(shapes, context.device, context.dtype)
    return Model(config, weights, byte_tokenizer(config.decoder.vocab))


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
