"""Live sessions on the whole engine, captured: 1,000 streams with windows of 60 s, 5 % of them answered; then
more of them, over float8 pages, until decisions come late. A minute of it, as in the product's claim:

    python bench/gpu_check.py --out DIR --section live --budget 240
"""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch

from fastloop.checkpoint import Model
from fastloop.config import small
from fastloop.engine import Engine, Session
from fastloop.engine.kv_cache import pages_for
from fastloop.engine.kv_layout import slot_bytes
from fastloop.engine.memory import session_pages
from fastloop.options import EngineConfig
from fastloop.testing.live import Load, populate, run_live, warm_up
from fastloop.testing.timing import Timing
from fastloop.text import prefix_ids

from .model import PAGE, whole_model
from .record import Context, Record

SESSIONS = 1000
MOST = 4096
STEP = 500  # sessions more in each further run
RESPONDING = 0.05
LATE_MS = 400.0  # one chunk
ROOM = 0.9  # of the free memory that pages may take
FIXED_S = 12.0  # that is kept for the end and for a second engine, about
RUN_S = 6.0  # of each further run
MORE_S = 45.0  # that the first of them takes, with its engine, windows and warm-ups, about


def run(context: Context, record: Record) -> None:
    """Lines: decision latency by number of sessions. Values: each run's summary, the most that kept up."""
    config = small(layers=1) if context.dry else context.config
    model = whole_model(config, context.device, context.dtype)
    count = 4 if context.dry else SESSIONS
    load = Load(RUN_S, responding=RESPONDING)
    if context.dry:
        load = Load(1.2, window_s=2.0, responding=0.5, tokens=4, tokens_per_s=10.0)
    record.put(runs=[], most_sessions=0)
    precision = "auto" if context.dry or _fits(model, load, count, "auto") >= count else "fp8"
    with engine_of(model, load, count, precision) as engine:
        sessions = populate(engine, load, count)
        warm_up(engine, sessions, load)
        held, reserved = _memory(context)
        record.put(reserved_bytes=reserved)
        if not context.dry:  # what is left now, for windows and graphs took their time
            seconds = min(60.0, max(8.0, (context.left_s - FIXED_S) / 2))
            load = dataclasses.replace(load, seconds=seconds)
        told = _run(engine, sessions, load, precision, record)
        grown = [now - before for now, before in zip(_memory(context), (held, reserved), strict=True)]
        record.put(growth_bytes=grown[0], reserved_growth_bytes=grown[1], steps=told["steps"])
        engine.close()
        engine.check()
        if engine.cache.allocator.used:
            record.problem(f"{engine.cache.allocator.used} pages are held after closing all sessions")
    del engine, sessions
    _free(context)
    if told["latency_ms"]["p99"] < LATE_MS and not context.dry:
        _more(model, count, context, record)
    record.put(most_text=f"{record.values['most_sessions']} sessions with p99 below {LATE_MS:.0f} ms")


def _more(model: Model, count: int, context: Context, record: Record) -> None:
    """More and more sessions in one engine, until they come late, or memory or time end."""
    load = Load(RUN_S, responding=RESPONDING)
    most = min(MOST, _fits(model, load, MOST, "fp8"))
    record.put(fit_in_memory=most)
    if most <= count or context.left_s < MORE_S:
        record.put(more_text=f"no more than {count} tried: {context.left_s:.0f} s left, {most} fit in memory")
        return
    with engine_of(model, load, most, "fp8") as engine:
        sessions = populate(engine, load, min(most, count + STEP))
        warm_up(engine, sessions, load)
        while True:
            told = _run(engine, sessions, load, "fp8", record)
            room = min(STEP, most - len(sessions))
            if told["latency_ms"]["p99"] >= LATE_MS or room <= 0 or context.left_s < 2.5 * RUN_S:
                return
            sessions += populate(engine, load, room)


def _run(
    engine: Engine, sessions: list[Session], load: Load, precision: str, record: Record
) -> dict[str, Any]:
    """One run; its line and its summary."""
    report = run_live(engine, sessions, load)
    if not report.latencies:
        raise RuntimeError(f"{len(sessions)} sessions: nothing was decided in {report.seconds:.1f} s")
    told = report.summary() | {"kv_precision": precision}
    note = (
        f"{told['seconds']:.0f} s, missed {told['missed']} of {told['decisions']}, {told['undecided']} left, "
        f"{told['responding']:.1%} respond at {told['tokens_per_s_each']:.0f} tokens/s, "
        f"busy {told['busy']:.0%}"
    )
    name = f"engine: decision, {len(sessions)} live sessions"
    record.line(name, f"captured, kv {precision}", Timing(tuple(report.latencies)), note=note)
    if told["latency_ms"]["p99"] < LATE_MS:
        record.values["most_sessions"] = max(record.values["most_sessions"], len(sessions))
    record.put(runs=[*record.values["runs"], told])
    return told


def engine_of(model: Model, load: Load, count: int, precision: str) -> Engine:
    """A captured engine with the pages of so many sessions of the load and no more."""
    pages = count * _pages(model, load) + 2 * pages_for(_prefix_tokens(model), PAGE)
    config = EngineConfig(
        max_sessions=count, runner="captured", admission="deadline", kv_precision=precision, kv_pages=pages
    )
    return Engine(model, config)


def _prefix_tokens(model: Model) -> int:
    return len(prefix_ids(model.config, model.tokenizer, "online", None))


def _pages(model: Model, load: Load) -> int:
    """Pages of one session at most."""
    session = load.session(model.config.chunk_seconds)
    return session_pages(model.config, EngineConfig(page_tokens=PAGE), session, (_prefix_tokens(model), 0))


def _fits(model: Model, load: Load, count: int, precision: str) -> int:
    """How many sessions the free memory holds, `count` at most."""
    if not torch.cuda.is_available():
        return count
    dtype = torch.float8_e4m3fn if precision == "fp8" else model.dtype
    layer = 2 * PAGE * slot_bytes(model.config.decoder, dtype)
    each = _pages(model, load) * model.config.decoder.layers * layer
    return min(count, int(ROOM * torch.cuda.mem_get_info()[0]) // each)


def _memory(context: Context) -> tuple[int, int]:
    """Bytes in use and bytes reserved, when the device is done."""
    if context.device != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _free(context: Context) -> None:
    gc.collect()
    if context.device == "cuda":
        torch.cuda.empty_cache()
