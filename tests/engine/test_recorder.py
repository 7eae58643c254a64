"""The recorder: a replay is what eager gives, to the bit; what a graph cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastloop import ops
from fastloop.decision import DecisionState
from fastloop.engine.buckets import Bucket
from fastloop.engine.device_step import DeviceStep
from fastloop.engine.kv_cache import KVCache
from fastloop.engine.recorder import CaptureError, Tape, record
from fastloop.engine.step_buffers import StepBuffers
from fastloop.ops.dispatch import REGISTRY
from fastloop.options import DecisionPolicy
from fastloop.testing.assertions import bits
from fastloop.testing.cases import random_model
from fastloop.testing.steps import MODEL, PAGE_TOKENS, PAGES, SESSIONS, random_batch
from fastloop.text import banned_tokens

CPU = torch.device("cpu")
BUCKET = Bucket(rows=128, decides=10, draws=32, pages=8)


@dataclass
class World:
    """A model with a pool and decision states of its own; worlds of one seed are equal."""

    step: DeviceStep
    buffers: StepBuffers

    @classmethod
    def create(cls, bucket: Bucket = BUCKET) -> World:
        model = random_model(MODEL, seed=5)
        cache = KVCache(MODEL, PAGES, PAGE_TOKENS, torch.float32, CPU)
        generator = torch.Generator().manual_seed(1)
        for pool in (cache.k_pages, cache.v_pages):
            pool.normal_(generator=generator)
        decisions = DecisionState(SESSIONS + 1)
        for slot in range(SESSIONS):
            decisions.reset(slot, DecisionPolicy(threshold=0.4 + slot % 3 / 10), MODEL)
        last = torch.zeros(SESSIONS + 1, dtype=torch.int64)
        step = DeviceStep(model, cache, decisions, banned_tokens(MODEL), last)
        buffers = StepBuffers.allocate(bucket, SESSIONS, MODEL.decoder.width, torch.float32, CPU)
        return cls(step, buffers)

    def capture(self) -> Tape:
        with record(self.step.static(self.buffers), self.step.constants()) as recorder:
            self.step.run(self.buffers)
        return recorder.tape

    def state(self) -> list[Tensor]:
        """Everything a step may change, but for the spare slot."""
        cache = self.step.cache
        return [cache.k_pages, cache.v_pages, self.step.decisions.state[:SESSIONS], self.step.last[:SESSIONS]]


@pytest.fixture(scope="module")
def pair() -> tuple[World, World, Tape]:
    """An eager world, one that is replayed, and its tape."""
    eager, replayed = World.create(), World.create()
    return eager, replayed, replayed.capture()


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(these, those, strict=True))


def test_capturing_padding_changes_no_session() -> None:
    untouched, world = World.create(), World.create()
    world.capture()
    assert same(world.state(), untouched.state())


@given(seed=st.integers(0, 2**32 - 1), listeners=st.integers(0, 8), speakers=st.integers(0, 24))
def test_a_replay_is_what_eager_gives(
    pair: tuple[World, World, Tape], seed: int, listeners: int, speakers: int
) -> None:
    """Batch after batch of one bucket, to the bit: results, keys and values, decision states."""
    eager, replayed, tape = pair
    batch = random_batch(np.random.default_rng(seed), max(listeners, int(not speakers)), speakers)
    for world in (eager, replayed):
        world.buffers.fill(batch)
        world.buffers.upload(batch)
    eager.step.run(eager.buffers)
    tape.replay()
    for world in (eager, replayed):
        world.buffers.download()
    got, want = (world.buffers.result(batch) for world in (replayed, eager))
    assert got == want
    assert len(got.drawn) == speakers and all(0 <= token < MODEL.decoder.vocab for token in got.drawn)
    assert same(replayed.state(), eager.state())


@given(seed=st.integers(0, 2**32 - 1))
def test_padding_and_bucket_leave_no_trace(seed: int) -> None:
    """The same batch in two buckets: equal decisions and tokens; no slot but the batch's own is touched."""
    batch = random_batch(np.random.default_rng(seed), listeners=1, speakers=2)
    worlds = World.create(Bucket(16, 1, 16, 8)), World.create(BUCKET)
    before = worlds[0].step.cache.k_pages.clone()
    for world in worlds:
        tape = world.capture()
        world.buffers.fill(batch)
        world.buffers.upload(batch)
        tape.replay()
        world.buffers.download()
        changed = (world.step.cache.k_pages != before).flatten(3).any(-1).any(0).flatten()
        assert set(changed.nonzero().flatten().tolist()) == set(batch.slots.tolist())
    small, large = (world.buffers.result(batch) for world in worlds)
    assert (small.decisions, small.drawn) == (large.decisions, large.drawn)
    assert np.allclose(small.p_respond, large.p_respond, rtol=0, atol=1e-5)  # the engine's contract


def test_a_tape_lists_the_launches_of_the_step(pair: tuple[World, World, Tape]) -> None:
    """One launch for each op of the decoder, with the implementation that ran and the buffers it writes."""
    _, world, tape = pair
    names = [launch.name for launch in tape.launches]
    layers = MODEL.decoder.layers
    assert names.count("linear[reference]") == 4 * layers + 1
    for op in ("rope_append", "paged_attention"):
        assert names.count(f"{op}[graph]") == layers
    assert names.count("decide[graph]") == names.count("sample[graph]") == 1
    static = {name for launch in tape.launches for name in launch.static}
    assert static == {"k_pages", "v_pages", "state", "last", "results"}
    assert str(tape).count("\n") == len(names) - 1 and "decide[graph]" in str(tape)
    assert world.buffers.bucket == BUCKET


def test_a_tape_without_text_runs_no_head() -> None:
    tape = World.create(Bucket(16, 1, 0, 8)).capture()
    names = [launch.name for launch in tape.launches]
    assert not any(name.startswith("sample") for name in names)
    assert names.count("linear[reference]") == 4 * MODEL.decoder.layers


x, out, weight = torch.randn(4), torch.zeros(4), torch.randn(4)
foreign = torch.ones(4)


def branch() -> None:
    if x.sum() > 0:
        out.fill_(1)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: x.sum().item(), "item reads a value on the host"),
        (lambda: x.tolist(), "tolist reads a value on the host"),
        (lambda: x.numpy(), "numpy reads a value on the host"),
        (lambda: float(x[0]), "__float__ reads a value on the host"),
        (lambda: range(x.long()[0]), "__index__ reads a value on the host"),
        (branch, "__bool__ reads a value on the host"),
        (lambda: torch.equal(x, out), r"aten.equal.* reads a value on the host"),
        (lambda: x.nonzero(), r"aten.nonzero.*its shape depends on values"),
        (lambda: x.masked_select(x > 0), r"aten.masked_select.*its shape depends on values"),
        (lambda: x[x > 0], r"aten.index.*its shape depends on values"),
        (lambda: out.index_put_((x > 0,), x[0]), r"aten.index_put_.*its shape depends on values"),
        (lambda: torch.unique(x), r"aten._unique2.*its shape depends on values"),
        (lambda: torch.repeat_interleave(x, x.long()), r"aten.repeat_interleave.*shape depends on values"),
        (lambda: torch.tensor([1.0, 2.0]), r"the host fills a tensor during the step"),
        (lambda: x + foreign, r"aten::add reads torch.float32 \[4\], which is neither a static buffer"),
        (lambda: foreign.add_(x), r"aten::add_ reads torch.float32 \[4\], which is neither"),
        (lambda: weight.mul_(2), r"aten::mul_ writes torch.float32 \[4\], a constant"),
        (lambda: torch.add(x, 1, out=weight), r"aten::add writes torch.float32 \[4\], a constant"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(step: Callable[[], object], message: str) -> None:
    kept = weight.clone(), foreign.clone()
    with (
        torch.inference_mode(),
        pytest.raises(CaptureError, match=message),
        record({"x": x, "out": out}, [weight]),
    ):
        step()
    assert torch.equal(weight, kept[0]) and torch.equal(foreign, kept[1])


@pytest.mark.parametrize("op", ["rope_append", "paged_attention", "decide", "sample"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_implementation_that_reads_the_host_is_refused(op: str, backend: str) -> None:
    """A forced backend that cannot be captured is an error, also deep inside the op; none falls back."""
    if backend not in REGISTRY[op].implementations:
        pytest.skip(f"{op} has no {backend}")
    world = World.create(Bucket(16, 1, 16, 8))
    with ops.use_backend(f"{op}={backend}"), pytest.raises(CaptureError, match=rf" in {op}\[{backend}\]"):
        world.capture()
