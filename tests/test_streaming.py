"""Streaming equals batch, stage by stage, at awkward sizes; mel has a file of its own (test_mel_stream.py).

The bound is the contract's: a relative error of 1e-5 for hidden states, 1e-5 for p(respond).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastloop.checkpoint import Model
from fastloop.config import MEL_BINS, ModelConfig, small
from fastloop.decoder import StepRows
from fastloop.engine import Engine
from fastloop.engine.kv_cache import KVCache, KVSequence, pages_for
from fastloop.engine.runner import StepBatch, StepResult
from fastloop.mel import MelStream
from fastloop.options import DecisionPolicy, EngineConfig, SessionConfig
from fastloop.testing.cases import random_model, random_sound
from fastloop.testing.drive import chances, lively_policy
from fastloop.testing.tolerance import relative_error
from fastloop.text import FIRST, LATER, banned_tokens, prefix_ids

BOUND = 1e-5


def deep(layers: int, **decoder: int) -> ModelConfig:
    config = small(layers=layers)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(deep(3), seed=3)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- encoder


@torch.inference_mode()
@given(chunks=st.integers(1, 9), seed=st.integers(0, 99), data=st.data())
def test_encoder_chunks_alone_and_in_any_batch(
    model: Model, chunks: int, seed: int, data: st.DataObject
) -> None:
    frames = noise(chunks, 40, MEL_BINS, seed=seed)
    batch = model.encoder.encode(frames)
    sizes = data.draw(st.lists(st.integers(1, chunks), min_size=1, max_size=4))
    at, parts = 0, []
    while at < chunks:
        parts.append(model.encoder.encode(frames[at : at + sizes[at % len(sizes)]]))
        at += sizes[at % len(sizes)]
    assert relative_error(torch.cat(parts), batch) < BOUND
    kept = data.draw(st.integers(0, chunks - 1))
    others = torch.full_like(frames, float("nan"))
    others[kept] = frames[kept]
    assert torch.equal(model.encoder.encode(others)[kept], batch[kept]), "a chunk sees another"


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 5])
def test_encoder_blocks_of_a_clip_are_chunks_of_that_length(count: int) -> None:
    """With native blocks of one chunk, a finished clip and its chunks are the same computation."""
    config = small()
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, block_frames=40))
    encoder = random_model(config).encoder
    frames = noise(count, 40, MEL_BINS, seed=count)
    assert (
        relative_error(encoder.encode_offline(frames.flatten(0, 1)), encoder.encode(frames).flatten(0, 1))
        < BOUND
    )


# ---- decoder


class Stream:
    """Rows of one stream behind a prefix, through the engine's own pages."""

    def __init__(self, model: Model, prefix: Tensor, page: int, pages: int = 200) -> None:
        self.model = model
        self.cache = KVCache(model.config, pages, page, torch.float32, "cpu")
        self.cache.k_pages.fill_(float("nan"))
        self.cache.v_pages.fill_(float("nan"))
        held = self.cache.allocator.allocate(pages_for(len(prefix), page))
        index = torch.arange(len(prefix))
        pages_of = torch.tensor(held)
        rows = StepRows(
            positions=index,
            slots=pages_of[index // page] * page + index % page,
            row_starts=torch.tensor([0, len(prefix)], dtype=torch.int32),
            block_table=pages_of[None].int(),
            kv_lens=torch.tensor([len(prefix)], dtype=torch.int32),
            gaps=torch.tensor([[len(prefix), len(prefix)]], dtype=torch.int32),
        )
        self.prefix_hidden = model.decoder.forward(prefix, rows, self.cache.k_pages, self.cache.v_pages)
        lease = self.cache.allocator.lease(0)
        self.kv = KVSequence(self.cache, lease, held, len(prefix))

    def feed(self, x: Tensor) -> Tensor:
        """Rows x [n, D] -> hidden [n, D]."""
        position = self.kv.position
        slots = torch.from_numpy(self.kv.extend(len(x)))
        rows = StepRows(
            positions=position + torch.arange(len(x)),
            slots=slots,
            row_starts=torch.tensor([0, len(x)], dtype=torch.int32),
            block_table=torch.tensor([self.kv.table], dtype=torch.int32),
            kv_lens=torch.tensor([self.kv.kv_len], dtype=torch.int32),
            gaps=torch.tensor([self.kv.gap], dtype=torch.int32),
        )
        return self.model.decoder.forward(x, rows, self.cache.k_pages, self.cache.v_pages)


@torch.inference_mode()
@given(
    prefix=st.integers(1, 20),
    page=st.sampled_from([1, 7, 16, 64]),
    pieces=st.lists(st.tuples(st.integers(1, 26), st.integers(0, 15)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_decoder_rows_in_pieces_equal_the_whole_sequence(
    model: Model, prefix: int, page: int, pieces: list[tuple[int, int]], seed: int
) -> None:
    """Any split, and after each piece the rows of a refused speculation are rolled back."""
    rows = noise(prefix + sum(count for count, _ in pieces), model.config.decoder.width, seed=seed)
    whole = model.decoder.sequence(rows[None])[0]
    stream, at, heard = Stream(model, rows[:prefix], page), prefix, []
    for count, refused in pieces:
        heard.append(stream.feed(rows[at : at + count]))
        at += count
        if refused:
            end = stream.kv.end
            stream.feed(noise(refused, rows.shape[1], seed=seed + 1))
            stream.kv.truncate(end)
    assert relative_error(torch.cat([stream.prefix_hidden, *heard]), whole) < BOUND
    stream.kv.lease.close()
    assert stream.cache.allocator.used == len(stream.kv.prefix_pages)


@torch.inference_mode()
@given(
    prefix=st.integers(1, 20),
    page=st.sampled_from([1, 7, 16]),
    units=st.lists(st.tuples(st.integers(1, 26), st.integers(0, 26)), min_size=2, max_size=9),
    seed=st.integers(0, 99),
)
def test_dropped_units_are_as_if_they_had_never_been(
    prefix: int, page: int, units: list[tuple[int, int]], seed: int
) -> None:
    """In a decoder of one layer no key knows of another row, so what is left after the window has dropped the
    oldest rows equals the sequence of prefix and kept rows: the rotation of the prefix is exact.
    """
    model = random_model(deep(1), seed=3)
    rows = noise(prefix + sum(count for count, _ in units), model.config.decoder.width, seed=seed)
    stream, at, first = Stream(model, rows[:prefix], page), prefix, prefix
    for count, drop in units:
        new = rows[at : at + count]
        hidden = stream.feed(new)
        at += count
        kept = torch.cat([rows[:prefix], rows[first:at]])
        assert relative_error(hidden, model.decoder.sequence(kept[None])[0, -count:]) < BOUND
        if 0 < drop <= at - first:
            stream.kv.drop(drop, model.decoder.inv_freq)
            first += drop


# ---- the whole loop


class Recorder:
    """An engine's runner that keeps the rows of every step."""

    def __init__(self, engine: Engine) -> None:
        self.inner, self.batches, self.drawn = engine.runner.step, [], []
        engine.runner.step = self.step  # type: ignore[method-assign]

    def step(self, batch: StepBatch) -> StepResult:
        result = self.inner(batch)
        self.batches.append(batch)
        self.drawn += result.drawn
        return result


@torch.inference_mode()
@pytest.mark.parametrize("edge", ["reflect", "wait"])
def test_a_stream_equals_one_pass_over_all_its_tokens(model: Model, edge: str) -> None:
    """Every p(respond) and every greedy token, from one causal pass over the whole token sequence."""
    config = SessionConfig(
        policy=lively_policy(model), max_response_tokens=9, speculative_chunks=1, edge=edge
    )
    engine = Engine(model, EngineConfig(max_sessions=1))
    recorder, session = Recorder(engine), engine.open(config)
    sound = random_sound(8.0025, seed=5)  # with the lookahead of edge="wait"
    for piece in np.array_split(sound, 23):
        session.push(piece)
        engine.run_until_idle()
    events = session.poll()

    (frames,) = MelStream(edge=edge).push(torch.from_numpy(sound)[None])
    audio = model.encoder.encode(frames.unflatten(0, (20, 40))).flatten(0, 1)
    prefix = prefix_ids(model.config, model.tokenizer, "online", None)
    ids = torch.tensor([*prefix, *(i for batch in recorder.batches for i in batch.ids.tolist())])
    x = model.decoder.embed(ids)
    x[ids == model.config.tokens.audio_pad] = audio
    logits = model.decoder.logits(model.decoder.sequence(x[None])[0])

    decides = (ids == model.config.tokens.assistant).nonzero().flatten()
    control = logits[decides][:, [model.config.tokens.keep_silence, model.config.tokens.text_begin]]
    assert np.abs(chances(events) - control.softmax(-1)[:, 1].numpy()).max() <= 1e-5
    assert {e.decision for e in events if e.type == "decision"} == {"silent", "respond"}

    banned, starts = (
        banned_tokens(model.config),
        np.cumsum([len(prefix), *(len(b.ids) for b in recorder.batches)]),
    )
    phases = [int(phase) for b in recorder.batches for phase in b.draw_phase]
    rows = [start + int(r) for start, b in zip(starts, recorder.batches, strict=False) for r in b.draw_rows]
    legal = logits[rows].masked_fill(banned[phases], -torch.inf)
    assert set(phases) == {FIRST, LATER} and legal.argmax(-1).tolist() == recorder.drawn


@pytest.mark.parametrize("edge", ["reflect", "wait"])
def test_the_size_of_the_pushes_changes_nothing(model: Model, edge: str) -> None:
    """Down to single samples: the same chunks come out."""
    config = SessionConfig(policy=DecisionPolicy(1.0), edge=edge, speculative_chunks=1)
    sound = random_sound(1.25, seed=6)

    def heard(sizes: list[int]) -> list[float]:
        engine = Engine(model, EngineConfig(max_sessions=1))
        session, at, turn = engine.open(config), 0, 0
        while at < len(sound):
            session.push(sound[at : at + sizes[turn % len(sizes)]])
            engine.run_until_idle()
            at, turn = at + sizes[turn % len(sizes)], turn + 1
        session.flush()
        engine.run_until_idle()
        return chances(session.poll()).tolist()

    truth = heard([len(sound)])
    assert len(truth) == 4
    for sizes in ([6400], [1, 6399], [7, 1, 400, 0, 5000], [39, 41]):
        assert np.abs(np.subtract(heard(sizes), truth)).max() <= 1e-5
