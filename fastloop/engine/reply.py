"""The reply loop of one session as a program of the device: the host begins it and reads along.

    body:       step (token in, token drawn) -> the next token's row of the schedule into the step's inputs
    condition:  the token drawn is not the last, the schedule goes on, the host has not said stop

The body is the step of fastloop.engine.device_step on the least bucket that draws, and a few operations on
its inputs, in place. Where each token's row goes is known before any is drawn: the host writes it down as a
schedule. Tokens and their number are copied to the host after each, the tokens first, so the host reads what
it finds. What the host says meanwhile is a flag in its own memory, copied up once a token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..text import LATER
from . import streams as schedule
from .buckets import Bucket, bucket_of, least_pages
from .conditional import refusal
from .device_step import DeviceStep
from .graphs import Graph, Graphs
from .runner import StepBatch
from .step_buffers import Shapes, StepBuffers, packed_bytes, views
from .streams import DECODE, Streams

REPLY_TOKENS = 256  # of one launch; a longer reply is several
POLL_S = 50e-6  # a token takes a millisecond or more
POSITION, SLOT, KV_LEN, COUNTER, MORE = range(5)  # columns of a schedule; MORE: whether that token is drawn
COLUMNS = {"positions": POSITION, "slots": SLOT, "kv_lens": KV_LEN, "counter": COUNTER}  # inputs of a step
_SHAPES: Shapes = {
    "count": (np.dtype(np.int64), (1,)),  # tokens drawn
    "schedule": (np.dtype(np.int64), (REPLY_TOKENS, 5)),  # row i: what the token behind the i-th one needs
}


def schedule_of(batch: StepBatch, limit: int, page_tokens: int) -> np.ndarray:
    """int64 [limit, 5]: the rows behind the first one, which is the batch's; the last one is never drawn.

    The batch's block table has the pages of all `limit` rows.
    """
    behind = np.arange(1, limit + 1)
    index = batch.kv_lens[0] - 1 + behind  # of the row among its sequence's slots
    table = batch.block_table[0].astype(np.int64)
    found = np.empty((limit, 5), dtype=np.int64)
    found[:, POSITION] = batch.positions[0] + behind
    found[:, SLOT] = (
        table[np.minimum(index // page_tokens, len(table) - 1)] * page_tokens + index % page_tokens
    )
    found[:, KV_LEN] = batch.kv_lens[0] + behind
    found[:, COUNTER] = batch.counter[0] + behind
    found[:, MORE] = behind < limit
    return found


@dataclass(frozen=True)
class ReplyBuffers:
    """Fixed addresses of the loop besides those of its step."""

    staging: Tensor  # host: count, schedule
    inputs: Tensor  # device
    go: Tensor  # device int32 [1]
    condition: Tensor  # device int32 [1]
    out: Tensor  # device int64 [REPLY_TOKENS], the tokens drawn
    told: Tensor  # host int32 [1]: 0, and the loop ends after the token it is at
    ring: Tensor  # host int64 [REPLY_TOKENS]: `out`, as it grows
    drawn: Tensor  # host int64 [1]: how many of them

    @classmethod
    def allocate(cls, device: torch.device) -> ReplyBuffers:
        """Memory of a loop, its schedule that of padding: rows that store no key."""
        pinned, size = device.type == "cuda", packed_bytes(_SHAPES)
        staging = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        padding = views(staging, _SHAPES)["schedule"]
        padding[:, SLOT], padding[:, KV_LEN] = -1, 1
        return cls(
            staging=staging,
            inputs=staging.to(device, copy=True),
            go=torch.ones(1, dtype=torch.int32, device=device),
            condition=torch.zeros(1, dtype=torch.int32, device=device),
            out=torch.zeros(REPLY_TOKENS, dtype=torch.int64, device=device),
            told=torch.ones(1, dtype=torch.int32, pin_memory=pinned),
            ring=torch.zeros(REPLY_TOKENS, dtype=torch.int64, pin_memory=pinned),
            drawn=torch.zeros(1, dtype=torch.int64, pin_memory=pinned),
        )

    def reset(self) -> None:
        """Padding only, as when it was allocated: what a program is captured on."""
        fresh = ReplyBuffers.allocate(torch.device("cpu"))
        self.staging.copy_(fresh.staging)
        self.inputs.copy_(self.staging)

    @property
    def static(self) -> dict[str, Tensor]:
        """By name, host memory included: the loop reads and writes it, too."""
        fields = dataclasses.fields(self)
        return {f"reply {field.name}": getattr(self, field.name) for field in fields}


class ReplyProgram:
    """The loop over one bucket of a single draw."""

    def __init__(self, step: DeviceStep, bucket: Bucket, spare_slot: int, own: ReplyBuffers) -> None:
        model = step.model
        width, dtype = model.config.decoder.width, model.dtype
        self.step, self.own = step, own
        self.buffers = StepBuffers.allocate(bucket, spare_slot, width, dtype, model.device)
        given = views(own.inputs, _SHAPES)
        self._count, self._schedule = given["count"], given["schedule"]
        # Whether a reply goes on behind a token; -1, logits that are not finite, is the last entry.
        vocab = model.config.decoder.vocab_padded
        self._goes_on = torch.ones(vocab + 1, dtype=torch.int64, device=model.device)
        self._goes_on[[model.config.tokens.text_end, vocab]] = 0
        own.reset()

    def fill(self, batch: StepBatch, limit: int) -> None:
        """The first step's batch, whose block table has the pages of all `limit` tokens."""
        if not 1 <= limit <= REPLY_TOKENS:
            raise ValueError(f"ReplyProgram: limit must be between 1 and {REPLY_TOKENS}, got {limit}")
        self.buffers.fill(batch)
        filled = views(self.own.staging, _SHAPES)
        filled["count"].fill_(0)
        rows = schedule_of(batch, limit, self.step.cache.page_tokens)
        filled["schedule"][:limit] = torch.from_numpy(rows)
        self.own.told.fill_(1)
        self.own.drawn.fill_(0)

    def upload(self, batch: StepBatch) -> None:
        self.buffers.upload(batch)
        self.own.inputs.copy_(self.own.staging, non_blocking=True)

    @torch.inference_mode()
    def body(self) -> None:
        """One token, and what the next one needs."""
        self.step.run(self.buffers)
        own, given, token = self.own, self.buffers.given, self.buffers.made["drawn"][:1]
        own.out.index_copy_(0, self._count, token)
        row = self._schedule.index_select(0, self._count)  # [1, 5]
        self._count.add_(1)
        for name, column in COLUMNS.items():
            given[name][:1].copy_(row[:, column])
        given["draw_phase"][:1].fill_(LATER)
        given["feed_slots"][:1].copy_(given["draw_slots"][:1])
        own.go.copy_(own.told, non_blocking=True)
        torch.mul(self._goes_on[token] * row[:, MORE], own.go, out=own.condition)
        own.ring.copy_(own.out, non_blocking=True)
        own.drawn.copy_(self._count, non_blocking=True)

    @property
    def static(self) -> dict[str, Tensor]:
        """What the loop reads and writes at fixed addresses."""
        return self.step.static(self.buffers) | self.own.static

    def constants(self) -> Iterator[Tensor]:
        """What the loop only reads."""
        yield self._goes_on
        yield from self.step.constants()


class Replies:
    """The replies of one runner, one at a time: `submit`, then `read` until it has told the end."""

    def __init__(self, step: DeviceStep, streams: Streams, graphs: Graphs, spare_slot: int) -> None:
        self._step, self._streams, self._graphs, self._spare_slot = step, streams, graphs, spare_slot
        self._own = ReplyBuffers.allocate(step.model.device)
        self._programs: dict[Bucket, tuple[ReplyProgram, Graph]] = {}
        self._read = 0  # tokens of the reply on its way that the host has taken

    @property
    def refusal(self) -> str:
        """Why there can be none on this device, or ""; on the CPU the recorder runs them."""
        device = self._step.model.device
        return refusal(device) if device.type == "cuda" else ""

    def submit(self, batch: StepBatch, limit: int) -> None:
        """Begin a reply of up to `limit` tokens; `batch` is its first step, one row, and its block table has
        the pages of all. No step may be on its way.
        """
        model = self._step.model
        bucket = bucket_of(batch, model.config.chunk_tokens + 2, least_pages(model.device))
        program, graph = self._program(bucket)
        self._read = 0
        schedule.reply(
            self._streams,
            fill=lambda: program.fill(batch, limit),
            upload=lambda: program.upload(batch),
            run=graph.replay,
        )

    def read(self) -> tuple[list[int], bool]:
        """Wait for tokens: those that have come since the last call, and whether no more will come."""
        while True:
            over = self._streams.done("replied")  # asked before the count, so nothing comes in between
            count = int(self._own.drawn)
            if over or count > self._read:
                tokens = self._own.ring[self._read : count].tolist()
                self._read = count
                return tokens, over
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Let the reply end after the token it is at."""
        self._own.told.fill_(0)

    def release(self) -> None:
        """Free the graphs and their buffers; no reply is on its way."""
        self._programs.clear()

    def _program(self, bucket: Bucket) -> tuple[ReplyProgram, Graph]:
        if bucket not in self._programs:
            program = ReplyProgram(self._step, bucket, self._spare_slot, self._own)
            condition, static = self._own.condition, program.static
            graph = self._graphs.make_loop(DECODE, program.body, condition, static, program.constants())
            self._programs[bucket] = program, graph
        return self._programs[bucket]
