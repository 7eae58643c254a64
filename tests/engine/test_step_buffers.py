"""Static buffers: what goes in comes out, nothing of an earlier batch is left, addresses never change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.engine.buckets import Bucket, bucket_of
from fastloop.engine.runner import StepBatch
from fastloop.engine.step_buffers import ALIGN, StepBuffers, packed_bytes, views
from fastloop.testing.steps import LISTENING_ROWS, MODEL, SESSIONS, random_batch

CPU = torch.device("cpu")


def buffers(bucket: Bucket) -> StepBuffers:
    return StepBuffers.allocate(bucket, SESSIONS, MODEL.decoder.width, torch.float32, CPU)


def given_to(own: StepBuffers, batch: StepBatch) -> dict[str, torch.Tensor]:
    own.fill(batch)
    own.upload(batch)
    return {name: tensor.clone() for name, tensor in own.given.items()}


@given(seed=st.integers(0, 2**32 - 1), draws=st.sampled_from([0, 16, 64]), rows=st.sampled_from([16, 208]))
def test_views_lie_apart_and_aligned(seed: int, draws: int, rows: int) -> None:
    shapes = Bucket(rows, 7, draws, 8).shapes()
    block = torch.zeros(packed_bytes(shapes), dtype=torch.uint8)
    rng = np.random.default_rng(seed)
    content = {
        name: torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(dtype))
        for name, (dtype, shape) in shapes.items()
    }
    found = views(block, shapes)
    for name, tensor in found.items():
        tensor.copy_(content[name])
        assert (tensor.data_ptr() - block.data_ptr()) % ALIGN == 0
    for name, tensor in found.items():
        assert torch.equal(tensor, content[name]), name


@given(seed=st.integers(0, 2**32 - 1), listeners=st.integers(1, 5), speakers=st.integers(0, 9))
def test_a_used_set_holds_what_a_fresh_one_does(seed: int, listeners: int, speakers: int) -> None:
    """Filling leaves nothing of the batch before, and no address changes."""
    rng = np.random.default_rng(seed)
    first, second = (random_batch(rng, n, speakers) for n in (listeners + 2, listeners))
    bucket = max(bucket_of(b, LISTENING_ROWS) for b in (first, second))
    bucket = Bucket(bucket.rows, bucket.decides, bucket.draws, max(8, first.block_table.shape[1]))
    used, fresh = buffers(bucket), buffers(bucket)
    addresses = {name: tensor.data_ptr() for name, tensor in used.given.items()}
    given_to(used, first)
    got, want = given_to(used, second), given_to(fresh, second)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(used.audio[: len(second.audio_rows)], torch.cat(list(second.audio)))
    assert addresses == {name: tensor.data_ptr() for name, tensor in used.given.items()}
    used.reset()
    assert all(torch.equal(tensor, buffers(bucket).given[name]) for name, tensor in used.given.items())


def test_two_sets_share_no_memory() -> None:
    bucket = Bucket(16, 1, 16, 8)
    one, other = buffers(bucket), buffers(bucket)
    batch = random_batch(np.random.default_rng(0), 1, 0)
    before = other.inputs.clone()
    given_to(one, batch)
    assert torch.equal(other.inputs, before) and not torch.equal(one.inputs, before)


def test_result_is_of_the_batch_alone() -> None:
    batch = random_batch(np.random.default_rng(1), listeners=2, speakers=3)
    own = buffers(bucket_of(batch, LISTENING_ROWS))
    for number, tensor in enumerate(own.made.values()):
        tensor.copy_(torch.arange(len(tensor)) + 10 * number)
    own.download()
    result = own.result(batch)
    assert (result.p_respond, result.decisions) == ([0.0, 1.0], [10, 11])
    assert result.drawn == [20, 21, 22]


def test_a_batch_that_does_not_fit_leaves_the_device_as_it_was() -> None:
    own = buffers(Bucket(16, 1, 0, 8))
    before = own.inputs.clone()
    with pytest.raises(ValueError, match=r"ids is \[26\], the captured step takes \[16\]"):
        own.fill(random_batch(np.random.default_rng(0), 2, 0, pending=True))
    assert torch.equal(own.inputs, before)
