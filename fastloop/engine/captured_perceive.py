"""Perception as graphs: chunks of many streams -> audio tokens, in buckets of streams and of chunks.

    pcm, slots (host) -> staging -> inputs | mel -> frames, one graph per bucket of streams, turn and edge
    frames of all rounds                   | encoder -> tokens, one graph per bucket of chunks

Padded streams have spare slots of the mel state, for a call's slots are distinct; padded chunks are encoded
and dropped, for chunks know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Model
from ..config import MEL_BINS
from ..mel import MelState, mel_chunk
from ..ops.contract import unread_values
from ..ops.dispatch import capturable
from ..ops.mel import LOOKAHEAD_SAMPLES, mel_constants
from . import streams as schedule
from .buckets import MOST_CHUNKS, SPARE_STREAMS, chunks_bucket
from .graphs import Graph, Graphs
from .runner import Round
from .step_buffers import Shapes, packed_bytes, views
from .streams import PERCEIVE, Streams


@dataclass(frozen=True)
class _Ear:
    """The buffers of one bucket of streams, one turn and one edge, and the graph that knows them."""

    staging: Tensor  # host, pinned where there is a GPU
    inputs: Tensor  # device
    frames: Tensor  # device, float32 [B, F, C]
    filled: dict[str, np.ndarray]  # views of staging: pcm float32 [B, S], slots int64 [B]
    given: dict[str, Tensor]  # views of inputs
    graph: Graph


class CapturedPerceive:
    """Mel and encoder of one runner. The last 2 SPARE_STREAMS slots of the mel state belong to no session."""

    def __init__(self, model: Model, mel: MelState, streams: Streams, graphs: Graphs) -> None:
        self._model, self._mel, self._streams, self._graphs = model, mel, streams, graphs
        config, device = model.config, model.device
        self._frames = torch.zeros(MOST_CHUNKS, config.chunk_frames, MEL_BINS, device=device)
        shape = (MOST_CHUNKS, config.chunk_tokens, config.decoder.width)
        self._encoded = torch.zeros(shape, dtype=model.dtype, device=device)
        self._ears: dict[tuple[int, int, str], _Ear] = {}
        self._encoders: dict[int, Graph] = {}
        first = len(mel.peak) - 2 * SPARE_STREAMS
        if first < 0:
            raise ValueError(
                f"CapturedPerceive: the mel state has {len(mel.peak)} slots; {2 * SPARE_STREAMS} are spare"
            )
        self._spares = {
            edge: np.arange(first + i * SPARE_STREAMS, first + (i + 1) * SPARE_STREAMS)
            for i, edge in enumerate(("reflect", "wait"))
        }
        schedule.begin(streams, "spare streams", self._begin_spares)
        self._rounds = 0  # so far

    @property
    def captured(self) -> tuple[list[int], list[int]]:
        """The buckets of streams and those of chunks that have graphs so far."""
        return sorted({streams for streams, _, _ in self._ears}), sorted(self._encoders)

    def warm_up(self, streams: int) -> None:
        """Capture what rounds of up to so many streams make, with edge="reflect"."""
        chunks = 1
        while chunks <= chunks_bucket(min(streams, MOST_CHUNKS)):
            for turn in range(2):
                self._ear(chunks, turn, "reflect", self._model.config.chunk_samples)
            self._encoder(chunks)
            chunks *= 2

    def release(self) -> None:
        """Free the graphs and their buffers; nothing is on its way."""
        self._ears.clear()
        self._encoders.clear()

    def perceive(self, rounds: Sequence[Round], number: int) -> Tensor:
        """Rounds of chunks -> the `number`-th group of audio tokens [n, A, D], in memory of its own."""
        made: list[Tensor] = []
        total, done, waiting = sum(len(r.pcm) for r in rounds), 0, 0
        for piece in _pieces(rounds):
            self._hear(piece, waiting)
            waiting += len(piece.pcm)
            if waiting == MOST_CHUNKS or done + waiting == total:
                self._encode(made, number, done, waiting, total)
                done, waiting = done + waiting, 0
        return made[0]

    def _hear(self, piece: Round, at: int) -> None:
        """The frames of one piece of a round; they come behind the `at` chunks that wait for the encoder."""
        turn, count = self._rounds % 2, len(piece.pcm)
        self._rounds += 1
        ear = self._ear(chunks_bucket(count), turn, piece.edge, piece.pcm.shape[1])

        def fill() -> None:
            ear.filled["pcm"][:count] = piece.pcm
            ear.filled["pcm"][count:] = 0
            ear.filled["slots"][:count] = piece.slots
            ear.filled["slots"][count:] = self._spares[piece.edge][: len(ear.frames) - count]

        def upload() -> None:
            ear.inputs.copy_(ear.staging, non_blocking=True)

        @torch.inference_mode()
        def mel() -> None:
            ear.graph.replay()
            self._frames[at : at + count].copy_(ear.frames[:count])

        schedule.hear(self._streams, turn, fill, upload, mel)

    def _encode(self, made: list[Tensor], number: int, done: int, count: int, total: int) -> None:
        """Encode the chunks that wait; they are those from `done` on of `total`."""
        graph = self._encoder(chunks_bucket(count))

        @torch.inference_mode()
        def encode() -> None:
            graph.replay()
            if not made:
                made.append(self._encoded.new_empty(total, *self._encoded.shape[1:]))
            made[0][done : done + count].copy_(self._encoded[:count])

        schedule.encode(self._streams, number, encode)

    def _ear(self, streams: int, turn: int, edge: str, samples: int) -> _Ear:
        """The set of a bucket, turn and edge; the first time it is allocated, and its graph captured."""
        key = (streams, turn, edge)
        if key not in self._ears:
            self._ears[key] = self._new_ear(streams, edge, samples)
        return self._ears[key]

    def _new_ear(self, streams: int, edge: str, samples: int) -> _Ear:
        device, real, whole = self._model.device, np.dtype(np.float32), np.dtype(np.int64)
        shapes: Shapes = {"pcm": (real, (streams, samples)), "slots": (whole, (streams,))}
        size = packed_bytes(shapes)
        staging = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        filled = {name: tensor.numpy() for name, tensor in views(staging, shapes).items()}
        filled["slots"][:] = self._spares[edge][:streams]  # a session in one of them would notice the capture
        inputs = staging.to(device, copy=True)
        given = views(inputs, shapes)
        frames = torch.zeros(streams, self._model.config.chunk_frames, MEL_BINS, device=device)

        @torch.inference_mode()
        def hear() -> None:
            with capturable(), unread_values():
                frames.copy_(mel_chunk(self._mel, given["slots"], given["pcm"], edge=edge))

        state = {name: getattr(self._mel, name) for name in ("tail", "peak", "seen")}
        static = {"inputs": inputs, "frames": frames, **state}
        graph = self._graphs.make(PERCEIVE, hear, static, mel_constants(device))
        return _Ear(staging, inputs, frames, filled, given, graph)

    def _encoder(self, chunks: int) -> Graph:
        if chunks not in self._encoders:
            frames, encoded, encoder = self._frames[:chunks], self._encoded[:chunks], self._model.encoder

            @torch.inference_mode()
            def encode() -> None:
                with capturable(), unread_values():
                    encoded.copy_(encoder.encode(frames))

            static = {"frames": self._frames, "encoded": self._encoded}
            constants = (*self._model.tensors, encoder.positions)
            self._encoders[chunks] = self._graphs.make(PERCEIVE, encode, static, constants)
        return self._encoders[chunks]

    def _begin_spares(self) -> None:
        """edge="wait" continues streams that were primed."""
        self._mel.seen[torch.from_numpy(self._spares["wait"]).to(self._mel.seen.device)] = LOOKAHEAD_SAMPLES


def _pieces(rounds: Sequence[Round]) -> Iterator[Round]:
    """The rounds' streams in order, cut where a pass of the encoder is full."""
    done = 0
    for r in rounds:
        first = 0
        while first < len(r.pcm):
            count = min(len(r.pcm) - first, MOST_CHUNKS - done % MOST_CHUNKS)
            yield Round(r.pcm[first : first + count], r.slots[first : first + count], r.edge)
            first, done = first + count, done + count
