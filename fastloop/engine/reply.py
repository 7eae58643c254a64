"""The reply loop of one session as a program of the device: the host begins it and reads along.

    body:       step (token in, token drawn) -> advance: the next row's slot, position, length -> condition
    condition:  the token drawn is not the last, there is room for more, the host has not said stop

The body is the step of fastloop.engine.device_step on the least bucket that draws, and a few operations on
its inputs, in place. Tokens and their number are copied to the host after each, the tokens first, so the host
reads what it finds. What the host says meanwhile is a flag in its own memory, copied up once a token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..text import LATER
from . import streams as schedule
from .buckets import Bucket, bucket_of
from .conditional import refusal
from .device_step import DeviceStep
from .graphs import Graph, Graphs
from .runner import StepBatch
from .step_buffers import StepBuffers, packed_bytes, views
from .streams import DECODE, Streams

REPLY_TOKENS = 256  # of one launch; a longer reply is several
POLL_S = 50e-6  # a token takes a millisecond or more
_SHAPES = {name: (np.dtype(np.int64), (1,)) for name in ("count", "limit")}


@dataclass(frozen=True)
class ReplyBuffers:
    """Fixed addresses of the loop besides those of its step."""

    staging: Tensor  # host: count, limit
    inputs: Tensor  # device
    stop: Tensor  # device int32 [1]
    condition: Tensor  # device int32 [1]
    out: Tensor  # device int64 [REPLY_TOKENS], the tokens drawn
    told: Tensor  # host int32 [1]: not zero, and the loop ends after the token it is at
    ring: Tensor  # host int64 [REPLY_TOKENS]: `out`, as it grows
    drawn: Tensor  # host int64 [1]: how many of them

    @classmethod
    def allocate(cls, device: torch.device) -> ReplyBuffers:
        pinned, size = device.type == "cuda", packed_bytes(_SHAPES)
        return cls(
            staging=torch.zeros(size, dtype=torch.uint8, pin_memory=pinned),
            inputs=torch.zeros(size, dtype=torch.uint8, device=device),
            stop=torch.zeros(1, dtype=torch.int32, device=device),
            condition=torch.zeros(1, dtype=torch.int32, device=device),
            out=torch.zeros(REPLY_TOKENS, dtype=torch.int64, device=device),
            told=torch.zeros(1, dtype=torch.int32, pin_memory=pinned),
            ring=torch.zeros(REPLY_TOKENS, dtype=torch.int64, pin_memory=pinned),
            drawn=torch.zeros(1, dtype=torch.int64, pin_memory=pinned),
        )

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
        self._text_end = model.config.tokens.text_end
        self._page_tokens = step.cache.page_tokens
        given = views(own.inputs, _SHAPES)
        self._count, self._limit = given["count"], given["limit"]

    def fill(self, batch: StepBatch, limit: int) -> None:
        """The first step's batch, whose block table has the pages of all `limit` tokens."""
        if not 1 <= limit <= REPLY_TOKENS:
            raise ValueError(f"ReplyProgram: limit must be between 1 and {REPLY_TOKENS}, got {limit}")
        self.buffers.fill(batch)
        filled = views(self.own.staging, _SHAPES)
        filled["count"].fill_(0)
        filled["limit"].fill_(limit)
        self.own.told.fill_(0)
        self.own.drawn.fill_(0)

    def upload(self, batch: StepBatch) -> None:
        self.buffers.upload(batch)
        self.own.inputs.copy_(self.own.staging, non_blocking=True)

    @torch.inference_mode()
    def body(self) -> None:
        """One token, and what the next one needs."""
        self.step.run(self.buffers)
        own, token = self.own, self.buffers.made["drawn"][:1]
        own.out.index_copy_(0, self._count, token)
        self._count.add_(1)
        self._advance(self.buffers.given)
        own.stop.copy_(own.told, non_blocking=True)
        more = (token != self._text_end) & (token >= 0) & (self._count < self._limit) & (own.stop == 0)
        own.condition.copy_(more)
        own.ring.copy_(own.out, non_blocking=True)
        own.drawn.copy_(self._count, non_blocking=True)

    def _advance(self, given: Mapping[str, Tensor]) -> None:
        """The inputs of the next token's row: it feeds on the token just drawn and stands one place further.

        A padded row, whose slot is -1, stays one: the body is captured on padding.
        """
        for name in ("positions", "kv_lens", "counter"):
            given[name][:1].add_(1)
        given["draw_phase"][:1].fill_(LATER)
        given["feed_slots"][:1].copy_(given["draw_slots"][:1])
        index, table = given["kv_lens"][:1].long() - 1, given["block_table"][0]
        pages = table.index_select(0, (index // self._page_tokens).clamp(max=len(table) - 1)).long()
        slots = given["slots"][:1]
        slots.copy_(torch.where(slots >= 0, pages * self._page_tokens + index % self._page_tokens, slots))

    @property
    def static(self) -> dict[str, Tensor]:
        """What the loop reads and writes at fixed addresses."""
        return self.step.static(self.buffers) | self.own.static

    def constants(self) -> Iterator[Tensor]:
        """What the loop only reads."""
        return self.step.constants()


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
        program, graph = self._program(bucket_of(batch, self._step.model.config.chunk_tokens + 2))
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
        self._own.told.fill_(1)

    def _program(self, bucket: Bucket) -> tuple[ReplyProgram, Graph]:
        if bucket not in self._programs:
            program = ReplyProgram(self._step, bucket, self._spare_slot, self._own)
            condition, static = self._own.condition, program.static
            graph = self._graphs.make_loop(DECODE, program.body, condition, static, program.constants())
            self._programs[bucket] = program, graph
        return self._programs[bucket]
