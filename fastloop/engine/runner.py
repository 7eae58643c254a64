"""What a step computes: perceive chunks, and one ragged pass of the decoder with its decisions and draws.

The eager runner calls the ops one by one. A runner is all the engine knows of the model, so another one
(captured graphs, a native plan, a recorder) takes its place without a change elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..checkpoint import Model
from ..config import FRAMES_PER_TOKEN
from ..decision import DecisionState, decide
from ..decoder import StepRows
from ..mel import MelState, log_mel, mel_chunk
from ..text import banned_tokens
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .reply import Replies


@dataclass(frozen=True)
class StepBatch:
    """One ragged step, on the host. N rows of B sequences; R rows decide; T rows draw a token."""

    ids: np.ndarray  # int64 [N]
    feed_slots: np.ndarray  # int64 [N], the session whose last drawn token is the row's id; -1: `ids` has it
    positions: np.ndarray  # int64 [N]
    slots: np.ndarray  # int64 [N]
    row_starts: np.ndarray  # int32 [B + 1]
    block_table: np.ndarray  # int32 [B, M]
    kv_lens: np.ndarray  # int32 [B]
    gaps: np.ndarray  # int32 [B, 2]
    audio_rows: np.ndarray  # int64 [n], rows whose embedding is an audio token
    audio: Sequence[Tensor]  # their tokens, [., D] each, in the order of audio_rows
    decide_rows: np.ndarray  # int64 [R], rows at ASSISTANT
    decide_slots: np.ndarray  # int64 [R], the session's row of the decision state
    draw_rows: np.ndarray  # int64 [T]
    draw_slots: np.ndarray  # int64 [T], the session that draws
    draw_phase: np.ndarray  # int64 [T], FIRST or LATER token of the response
    temperature: np.ndarray  # float32 [T]
    top_k: np.ndarray  # int64 [T]
    top_p: np.ndarray  # float32 [T]
    seed: np.ndarray  # int64 [T]
    counter: np.ndarray  # int64 [T], the row's position: what makes a draw repeatable


@dataclass(frozen=True)
class StepResult:
    p_respond: list[float]  # [R]
    decisions: list[int]  # [R]
    drawn: list[int]  # [T]


@dataclass(frozen=True)
class Round:
    """The next chunk of each of B streams."""

    pcm: np.ndarray  # float32 [B, S]
    slots: Sequence[int]  # [B], distinct
    edge: str


class Runner(Protocol):
    """The model as the engine sees it."""

    @property
    def depth(self) -> int:
        """How many steps may be on their way when the next one is planned, and that one included."""

    @property
    def replies(self) -> Replies | None:
        """Replies without the host, where the runner has them."""

    def open(self, slot: int) -> None:
        """A fresh stream in a state slot."""

    def prepare(self, name: str, work: Callable[[], None]) -> None:
        """Work on pages and decision states outside a step: behind all steps so far, before the next one."""

    def settle(self, name: str, work: Callable[[], None]) -> None:
        """Work on any state, behind everything so far and before anything later; done when this returns."""

    def prime(self, pcm: np.ndarray, slot: int) -> None:
        """edge="wait": the first LOOKAHEAD_SAMPLES samples of a stream."""

    def perceive(self, rounds: Sequence[Round]) -> Tensor:
        """Chunks, round after round -> audio tokens [n, A, D] in their order; the streams move on."""

    def encode_clip(self, pcm: np.ndarray) -> Tensor:
        """A finished clip, float32 [S] -> audio tokens [n, D]."""

    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Write the keys and values of a prefix into its pages."""

    def submit(self, batch: StepBatch) -> None:
        """Begin one ragged pass of the decoder."""

    def collect(self) -> StepResult:
        """The result of the oldest step that was submitted and not collected."""

    def warm_up(self, rows: int, draws: int, streams: int) -> None:
        """Make now what would be made when steps of so many rows, so many of which draw a token, and rounds
        of so many streams first occur.
        """

    def release(self) -> None:
        """Free at once what a later step would make again. Every step has been collected."""


class EagerRunner:
    """Op by op, on the model's device."""

    depth = 1
    replies: Replies | None = None

    def __init__(self, model: Model, cache: KVCache, decisions: DecisionState, mel: MelState) -> None:
        self.model = model
        self.cache = cache
        self.decisions = decisions
        self.mel = mel
        self.banned = banned_tokens(model.config, model.device)
        self._results: deque[StepResult] = deque()

    def open(self, slot: int) -> None:
        mask = torch.zeros(len(self.mel.peak), dtype=torch.bool, device=self.mel.peak.device)
        mask[slot] = True
        self.mel.reset(mask)

    def prime(self, pcm: np.ndarray, slot: int) -> None:
        self.mel.prime(slot, self._tensor(pcm))

    def prepare(self, name: str, work: Callable[[], None]) -> None:
        work()

    def settle(self, name: str, work: Callable[[], None]) -> None:
        work()

    def perceive(self, rounds: Sequence[Round]) -> Tensor:
        return self.encode(torch.cat([self.hear(r.pcm, r.slots, r.edge) for r in rounds]))

    @torch.inference_mode()
    def hear(self, pcm: np.ndarray, slots: Sequence[int], edge: str) -> Tensor:
        """One chunk of each of B streams: float32 [B, S] -> mel frames [B, F, C]; the streams move on."""
        rows = torch.as_tensor(slots, dtype=torch.int64, device=self.model.device)
        return mel_chunk(self.mel, rows, self._tensor(pcm), edge=edge)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """Mel frames [B, F, C] -> audio tokens [B, A, D]."""
        return self.model.encoder.encode(frames)

    @torch.inference_mode()
    def encode_clip(self, pcm: np.ndarray) -> Tensor:
        whole = -(-len(pcm) // (160 * FRAMES_PER_TOKEN)) * 160 * FRAMES_PER_TOKEN
        padded = np.pad(pcm, (0, whole - len(pcm)))
        return self._encode_offline(log_mel(self._tensor(padded)))

    def _encode_offline(self, frames: Tensor) -> Tensor:
        return self.model.encoder.encode_offline(frames)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        batch = self._prefix_batch(ids, pages)
        x = self.model.decoder.embed(self._tensor(batch.ids))
        self.model.decoder.forward(x, self._rows(batch), *self.cache.pages)

    def _prefix_batch(self, ids: Sequence[int], pages: Sequence[int]) -> StepBatch:
        """The rows of a prompt as a step that decides and draws nothing."""
        count, page = len(ids), self.cache.page_tokens
        index = np.arange(count)
        none = np.empty(0, dtype=np.int64)
        return StepBatch(
            ids=np.asarray(ids, dtype=np.int64),
            feed_slots=np.full(count, -1),
            positions=index,
            slots=np.asarray(pages, dtype=np.int64)[index // page] * page + index % page,
            row_starts=np.array([0, count], dtype=np.int32),
            block_table=np.array([pages], dtype=np.int32),
            kv_lens=np.array([count], dtype=np.int32),
            gaps=np.array([[count, count]], dtype=np.int32),
            audio_rows=none,
            audio=[],
            decide_rows=none,
            decide_slots=none,
            draw_rows=none,
            draw_slots=none,
            draw_phase=none,
            temperature=np.empty(0, dtype=np.float32),
            top_k=none,
            top_p=np.empty(0, dtype=np.float32),
            seed=none,
            counter=none,
        )

    def submit(self, batch: StepBatch) -> None:
        self._results.append(self.step(batch))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def warm_up(self, rows: int, draws: int, streams: int) -> None: ...

    def release(self) -> None:
        pass

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> StepResult:
        """One ragged pass of the decoder."""
        assert (batch.feed_slots < 0).all(), "only a captured step knows the tokens of the one before it"
        decoder, tensor = self.model.decoder, self._tensor
        x = decoder.embed(tensor(batch.ids))
        if len(batch.audio):
            x[tensor(batch.audio_rows)] = torch.cat(list(batch.audio)).to(x.dtype)
        hidden = decoder.forward(x, self._rows(batch), *self.cache.pages)
        p, decisions = self._decide(hidden, batch)
        drawn = len(batch.draw_rows) > 0
        logits = decoder.logits(hidden[tensor(batch.draw_rows)]) if drawn else hidden[:0]
        return StepResult(p, decisions, self._sample(logits, batch))

    def _rows(self, batch: StepBatch) -> StepRows:
        return StepRows(
            positions=self._tensor(batch.positions),
            slots=self._tensor(batch.slots),
            row_starts=self._tensor(batch.row_starts),
            block_table=self._tensor(batch.block_table),
            kv_lens=self._tensor(batch.kv_lens),
            gaps=self._tensor(batch.gaps),
        )

    def _decide(self, hidden: Tensor, batch: StepBatch) -> tuple[list[float], list[int]]:
        if not len(batch.decide_rows):
            return [], []
        rows, slots = self._tensor(batch.decide_rows), self._tensor(batch.decide_slots)
        p, decisions = decide(self.model.decoder, hidden[rows], slots, self.decisions)
        return p.tolist(), decisions.tolist()

    def _sample(self, logits: Tensor, batch: StepBatch) -> list[int]:
        """logits [T, V] -> ids."""
        if not len(batch.draw_rows):
            return []
        options = (
            batch.draw_phase,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.seed,
            batch.counter,
        )
        return ops.sample(logits, self.banned, *(self._tensor(o) for o in options)).tolist()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)
