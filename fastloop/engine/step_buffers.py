"""The fixed addresses that a captured step reads and writes: one packed block up, one of results down.

    StepBatch -> staging (host, pinned) -> inputs (device) -> the step -> results (device) -> ring (host)

A captured step knows its tensors by address, so a batch is copied into these and nothing is allocated. There
are two sets of them for each bucket, used in turn: the host fills one while a step reads the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decoder import StepRows
from .buckets import Bucket, clear, pad
from .runner import StepBatch, StepResult

ALIGN = 64  # bytes: a cache line, and more than any vector load of a kernel needs

Shapes = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


def packed_bytes(shapes: Shapes) -> int:
    """Bytes of a block that holds arrays of these shapes one after another, each aligned to ALIGN."""
    return sum(_aligned(dtype, shape) for dtype, shape in shapes.values())


def _aligned(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    size = dtype.itemsize * int(np.prod(shape))
    return -(-size // ALIGN) * ALIGN


def views(block: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """block uint8 [packed_bytes] -> name -> the tensor that lies in it."""
    found, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * int(np.prod(shape))
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        found[name] = block[start : start + size].view(kind).view(shape)
        start += _aligned(dtype, shape)
    return found


@dataclass(frozen=True)
class StepBuffers:
    """One set of buffers of one bucket. Blocks are uint8 and packed; the mappings are views of them."""

    bucket: Bucket
    spare_slot: int  # the state slot of padded decisions
    staging: Tensor  # host, pinned where there is a GPU
    inputs: Tensor  # device
    audio: Tensor  # device, [N, D] in the model's dtype: the step's audio tokens
    results: Tensor  # device
    ring: Tensor  # host, pinned where there is a GPU
    filled: dict[str, np.ndarray]  # views of staging
    given: dict[str, Tensor]  # views of inputs
    made: dict[str, Tensor]  # views of results
    read: dict[str, Tensor]  # views of ring

    @classmethod
    def allocate(
        cls, bucket: Bucket, spare_slot: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> StepBuffers:
        """Memory of one set, holding padding only. width: D of the audio tokens."""
        pinned = device.type == "cuda"
        shapes, outcome = bucket.shapes(), _outcome(bucket)
        up, down = packed_bytes(shapes), packed_bytes(outcome)
        staging = torch.zeros(up, dtype=torch.uint8, pin_memory=pinned)
        ring = torch.zeros(down, dtype=torch.uint8, pin_memory=pinned)
        inputs, results = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (up, down))
        audio = torch.zeros(bucket.rows, width, dtype=dtype, device=device)
        filled = {name: tensor.numpy() for name, tensor in views(staging, shapes).items()}
        given, made, read = views(inputs, shapes), views(results, outcome), views(ring, outcome)
        buffers = cls(bucket, spare_slot, staging, inputs, audio, results, ring, filled, given, made, read)
        buffers.reset()
        return buffers

    def reset(self) -> None:
        """Padding only, on the host and on the device: a step on it changes no session."""
        clear(self.filled, self.spare_slot)
        self.inputs.copy_(self.staging)
        self.audio.zero_()

    def fill(self, batch: StepBatch) -> None:
        """Write a batch and its padding into `staging`; ValueError where it does not fit the bucket."""
        pad(batch, self.bucket, self.spare_slot, self.filled)

    def upload(self, batch: StepBatch) -> None:
        """staging -> inputs, and the batch's audio tokens -> audio; on a GPU without waiting for it."""
        self.inputs.copy_(self.staging, non_blocking=True)
        start = 0
        for tokens in batch.audio:
            self.audio[start : start + len(tokens)].copy_(tokens, non_blocking=True)
            if tokens.is_cuda:  # made on another stream: its memory stays until this copy is done
                tokens.record_stream(torch.cuda.current_stream(tokens.device))
            start += len(tokens)

    def download(self) -> None:
        """results -> ring; on a GPU without waiting for it."""
        self.ring.copy_(self.results, non_blocking=True)

    def result(self, batch: StepBatch) -> StepResult:
        """What a batch's own rows have in the ring."""
        decides, draws = len(batch.decide_rows), len(batch.draw_rows)
        return StepResult(
            p_respond=self.read["p_respond"][:decides].tolist(),
            decisions=self.read["decisions"][:decides].tolist(),
            drawn=self.read["drawn"][:draws].tolist(),
        )

    @property
    def rows(self) -> StepRows:
        """Where the rows sit: what the attention layers of the step read."""
        return StepRows(**{name: self.given[name] for name in StepRows.__dataclass_fields__})

    @property
    def static(self) -> dict[str, Tensor]:
        """The device tensors by name: what a recording may take for granted and write to."""
        return {"inputs": self.inputs, "audio": self.audio, "results": self.results}


def _outcome(bucket: Bucket) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Name -> (dtype, shape) of every array that a step hands to the host."""
    real, index, whole = (np.dtype(kind) for kind in (np.float32, np.int32, np.int64))
    return {
        "p_respond": (real, (bucket.decides,)),
        "decisions": (index, (bucket.decides,)),
        "drawn": (whole, (bucket.draws,)),
    }
