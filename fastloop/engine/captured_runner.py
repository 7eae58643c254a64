"""The captured runner: steps padded to buckets, each bucket recorded once and replayed from fixed buffers.

    submit: StepBatch -> its bucket's set of this turn -> upload -> graph -> download    (nothing is awaited)
    collect: the oldest submitted step -> StepResult                                     (step: both at once)

Graphs (fastloop.engine.graphs) are captured when their bucket first occurs, on padding alone, so that no
session notices. The runner changes no global state of torch, and several may live in one process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Model
from ..decision import DecisionState
from ..mel import MelState
from . import streams as schedule
from .buckets import Bucket, bucket_of, buckets_of, least_pages
from .captured_perceive import CapturedPerceive
from .device_step import DeviceStep
from .graphs import Graph, Graphs
from .kv_cache import KVCache
from .reply import Replies
from .runner import EagerRunner, Round, StepBatch, StepResult
from .step_buffers import StepBuffers
from .streams import DECODE, CudaStreams, HostStreams, Streams


@dataclass(frozen=True)
class _Set:
    """The buffers of one bucket and one turn, and the graph that knows their addresses."""

    buffers: StepBuffers
    graph: Graph


class CapturedRunner(EagerRunner):
    """Equal to the eager runner, without an allocation or a host read inside a step of a known bucket.

    decisions: its last slot belongs to no session; padded decisions go there.
    mel: its last 2 SPARE_STREAMS slots belong to no session; padded streams go there.
    """

    depth = 2

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        decisions: DecisionState,
        mel: MelState,
        streams: Streams | None = None,
    ) -> None:
        super().__init__(model, cache, decisions, mel)
        on_gpu = model.device.type == "cuda"
        self._streams = streams or (CudaStreams(model.device) if on_gpu else HostStreams())
        self._graphs = Graphs(model.device, self._streams)
        last = torch.zeros(len(decisions.state), dtype=torch.int64, device=model.device)
        self._step = DeviceStep(model, cache, decisions, self.banned, last)
        self._spare_slot = len(decisions.state) - 1
        self._least_pages = least_pages(model.device)
        self._sets: dict[tuple[Bucket, int], _Set] = {}
        self._perceive = CapturedPerceive(model, mel, self._streams, self._graphs)
        self._groups = self._steps = 0  # of audio tokens, of submit so far
        self._waiting: deque[tuple[int, StepBuffers, StepBatch]] = deque()  # submitted, not collected
        self.replies = Replies(self._step, self._streams, self._graphs, self._spare_slot)

    def open(self, slot: int) -> None:
        begin = super().open
        schedule.begin(self._streams, "open", lambda: begin(slot))

    def prime(self, pcm: np.ndarray, slot: int) -> None:
        prime = super().prime
        schedule.begin(self._streams, "prime", lambda: prime(pcm, slot))

    def prepare(self, name: str, work: Callable[[], None]) -> None:
        schedule.prepare(self._streams, name, work)

    def settle(self, name: str, work: Callable[[], None]) -> None:
        schedule.settle(self._streams, name, work)

    # ---- perceive --------------------------------------------------------------------------------------

    def perceive(self, rounds: Sequence[Round]) -> Tensor:
        self._groups += 1
        return self._perceive.perceive(rounds, self._groups)

    def encode_clip(self, pcm: np.ndarray) -> Tensor:
        tokens: list[Tensor] = []
        self._groups += 1
        encode = super().encode_clip
        schedule.clip(self._streams, self._groups, lambda: tokens.append(encode(pcm)))
        return tokens[0]

    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        prefill = super().prefill
        self.prepare("prefill", lambda: prefill(ids, pages))

    # ---- decode ----------------------------------------------------------------------------------------

    def step(self, batch: StepBatch) -> StepResult:
        self.submit(batch)
        return self.collect()

    def submit(self, batch: StepBatch) -> None:
        """Queue a step. At most two are on their way; RuntimeError where a third would overwrite the first.

        ValueError, naming argument and shapes, where the batch's arrays do not fit each other; nothing has
        happened then.
        """
        if len(self._waiting) == 2:
            raise RuntimeError("CapturedRunner.submit: two steps are on their way; collect() the older one")
        turn = self._steps % 2
        own = self._set(bucket_of(batch, self.model.config.chunk_tokens + 2, self._least_pages), turn)
        buffers = own.buffers
        schedule.submit(
            self._streams,
            turn,
            self._groups,
            fill=lambda: buffers.fill(batch),
            upload=lambda: buffers.upload(batch),
            step=own.graph.replay,
            download=buffers.download,
        )
        self._steps += 1
        self._waiting.append((turn, buffers, batch))

    def collect(self) -> StepResult:
        """Wait for the oldest submitted step; its result."""
        if not self._waiting:
            raise RuntimeError("CapturedRunner.collect: no step is on its way; submit() one first")
        turn, buffers, batch = self._waiting.popleft()
        results: list[StepResult] = []
        schedule.collect(self._streams, turn, lambda: results.append(buffers.result(batch)))
        return results[0]

    def warm_up(self, rows: int, draws: int, streams: int) -> None:
        """Capture them, for contexts of as many pages as every block table has (`least_pages`) and streams
        with edge="reflect".
        """
        self.settle("warm up", lambda: None)
        for bucket in buckets_of(rows, draws, self.model.config.chunk_tokens + 2, self._least_pages):
            for turn in range(2):
                self._set(bucket, turn)
        self._perceive.warm_up(streams)

    def release(self) -> None:
        """The graphs and their buffers. An engine that was dropped is cycles of garbage, which any thread may
        collect at any time: one that captures graphs could not destroy these.
        """
        self.settle("release", lambda: None)
        self._sets.clear()
        self._perceive.release()
        if self.replies is not None:
            self.replies.release()

    @property
    def captured(self) -> list[Bucket]:
        """The buckets that have a graph so far, in order."""
        return sorted({bucket for bucket, _ in self._sets})

    def _set(self, bucket: Bucket, turn: int) -> _Set:
        """The set of a bucket and turn; the first time it is allocated, and its graph captured."""
        if (bucket, turn) not in self._sets:
            width, dtype, device = self.model.config.decoder.width, self.model.dtype, self.model.device
            buffers = StepBuffers.allocate(bucket, self._spare_slot, width, dtype, device)
            step = self._step
            graph = self._graphs.make(
                DECODE, lambda: step.run(buffers), step.static(buffers), step.constants()
            )
            self._sets[bucket, turn] = _Set(buffers, graph)
        return self._sets[bucket, turn]
