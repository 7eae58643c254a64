"""The captured runner: steps padded to buckets, each bucket recorded once and replayed from fixed buffers.

    submit: StepBatch -> its bucket's set of this turn -> upload -> graph -> download    (nothing is awaited)
    collect: the oldest submitted step -> StepResult                                     (step: both at once)

On a GPU a graph is a torch.cuda.CUDAGraph; on the CPU it is the recorder's tape, which refuses what a graph
could not do (fastloop.engine.recorder). Graphs are captured when their bucket first occurs, on padding alone,
so that no session notices; those of one runner share one memory pool. FASTLOOP_CAPTURE=0 runs the same steps
op by op. The runner changes no global state of torch, and several may live in one process.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Model
from ..config import ConfigError
from ..decision import DecisionState
from ..mel import MelState, mel_chunk
from . import streams as schedule
from .buckets import Bucket, bucket_of, rows_bucket
from .device_step import DeviceStep
from .kv_cache import KVCache
from .recorder import record
from .runner import EagerRunner, StepBatch, StepResult
from .step_buffers import StepBuffers
from .streams import CudaStreams, HostStreams, Streams

WARM_UPS = 2  # of a step before it is captured: libraries allocate and kernels compile in the first calls


class Graph(Protocol):
    def replay(self) -> None: ...


@dataclass
class _Eager:
    """What takes the place of a graph when capturing is switched off."""

    replay: Callable[[], None]


@dataclass(frozen=True)
class _Set:
    """The buffers of one bucket and one turn, and the graph that knows their addresses."""

    buffers: StepBuffers
    graph: Graph


@dataclass
class _Pcm:
    """Sound of one round of chunks, float32 [B, S]: staging on the host (pinned), and on the device."""

    staging: Tensor
    device: Tensor


def capture_enabled() -> bool:
    """FASTLOOP_CAPTURE: "1" (default) captures, "0" runs every step op by op."""
    value = os.environ.get("FASTLOOP_CAPTURE", "1")
    if value not in ("0", "1"):
        raise ConfigError(f"FASTLOOP_CAPTURE: must be 0 or 1, got {value!r}")
    return value == "1"


class CapturedRunner(EagerRunner):
    """Equal to the eager runner, without an allocation or a host read inside a step of a known bucket.

    decisions: its last slot belongs to no session; padded decisions go there.
    """

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
        self._capture = capture_enabled()
        self._pool = torch.cuda.graph_pool_handle() if on_gpu and self._capture else None
        self._step = DeviceStep(model, cache, decisions, self.banned)
        self._spare_slot = len(decisions.state) - 1
        self._sets: dict[tuple[Bucket, int], _Set] = {}
        self._pcm: list[_Pcm | None] = [None, None]
        self._rounds = self._groups = self._steps = 0  # of hear, encode, submit so far
        self._waiting: deque[tuple[int, StepBuffers, StepBatch]] = deque()  # submitted, not collected

    # ---- perceive --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def hear(self, pcm: np.ndarray, slots: Sequence[int], edge: str) -> Tensor:
        turn = self._rounds % 2
        self._rounds += 1
        block, count = self._pcm_block(turn, pcm.shape), len(pcm)
        rows = torch.as_tensor(slots, dtype=torch.int64, device=self.model.device)
        frames: list[Tensor] = []

        def fill() -> None:
            block.staging[:count].copy_(torch.from_numpy(pcm))

        def upload() -> None:
            block.device[:count].copy_(block.staging[:count], non_blocking=True)

        def perceive() -> None:
            frames.append(mel_chunk(self.mel, rows, block.device[:count], edge=edge))

        schedule.hear(self._streams, turn, fill, upload, perceive)
        return frames[0]

    def _pcm_block(self, turn: int, shape: tuple[int, ...]) -> _Pcm:
        """The block of this turn, larger than before where more streams come or a chunk is longer."""
        block = self._pcm[turn]
        count, samples = shape
        if block is None or len(block.staging) < count or block.staging.shape[1] != samples:
            size, device = (rows_bucket(count), samples), self.model.device
            staging = torch.zeros(size, pin_memory=device.type == "cuda")
            block = self._pcm[turn] = _Pcm(staging, torch.zeros(size, device=device))
        return block

    def encode(self, frames: Tensor) -> Tensor:
        tokens: list[Tensor] = []
        self._groups += 1
        encode = super().encode
        schedule.encode(self._streams, self._groups, lambda: tokens.append(encode(frames)))
        return tokens[0]

    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        prefill = super().prefill
        schedule.prepare(self._streams, "prefill", lambda: prefill(ids, pages))

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
        own = self._set(bucket_of(batch, self.model.config.chunk_tokens + 2), turn)
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

    @property
    def captured(self) -> list[Bucket]:
        """The buckets that have a graph so far, in order."""
        return sorted({bucket for bucket, _ in self._sets})

    def _set(self, bucket: Bucket, turn: int) -> _Set:
        """The set of a bucket and turn; the first time it is allocated, and its graph captured."""
        if (bucket, turn) not in self._sets:
            width, dtype, device = self.model.config.decoder.width, self.model.dtype, self.model.device
            buffers = StepBuffers.allocate(bucket, self._spare_slot, width, dtype, device)
            graphs: list[Graph] = []
            if self._capture:
                schedule.capture(self._streams, lambda: graphs.append(self._captured(buffers)))
            else:
                graphs.append(_Eager(lambda: self._step.run(buffers)))
            self._sets[bucket, turn] = _Set(buffers, graphs[0])
        return self._sets[bucket, turn]

    def _captured(self, buffers: StepBuffers) -> Graph:
        """The graph of a step on buffers that hold nothing but padding."""
        step = self._step
        if self.model.device.type == "cuda":
            return capture_cuda(lambda: step.run(buffers), self._pool)
        return capture_tape(lambda: step.run(buffers), step.static(buffers), step.constants())


def capture_tape(
    step: Callable[[], None], static: Mapping[str, Tensor], constants: Iterable[Tensor]
) -> Graph:
    """The recorder's tape of a step on the CPU; CaptureError where no graph could capture it."""
    with record(static, constants) as recorder:
        step()
    return recorder.tape


def capture_cuda(step: Callable[[], None], pool: Any) -> Graph:
    """The CUDA graph of a step, captured on the current stream (not the default one). Graphs share the pool,
    for they run one after another on that stream, and none keeps anything there.

    Other threads of the process may go on using the GPU while it is captured.
    """
    for _ in range(WARM_UPS):
        step()
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, pool=pool, stream=here, capture_error_mode="thread_local"):
        step()
    return graph
