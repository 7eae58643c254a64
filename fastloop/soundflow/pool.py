"""A pool of generated scenes as features, and training batches drawn from it.

Scene i of a pool is a function of (seed, i), batch n of (seed, n): nothing depends on timing, on the
number of worker processes or on what was drawn before.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from ..config import ModelConfig
from ..text import Tokenizer
from .features import clamp, raw_log_mel
from .scenes import Event, scene
from .sequence import Reply, answer_chunk, build, plan
from .train import Batch, collate

BATCH_SCENES = 6  # scenes in a batch, joined into streams of 1, 2 or 3
AHEAD = 24  # scenes the workers may be ahead


@dataclass(frozen=True)
class Features:
    """One scene: raw log10 mel power float16 [chunks, F, C], and its events."""

    raw: np.ndarray
    events: tuple[Event, ...]


def features(seed: int, index: int, seconds: float, chunk_samples: int) -> Features:
    """Scene `index` of collection `seed` as the encoder's input, before the clamp."""
    torch.set_num_threads(1)
    made = scene(seed, index, seconds)
    raw = raw_log_mel(torch.from_numpy(made.pcm), chunk_samples)
    return Features(raw.half().numpy(), made.events)


class Pool:
    """`size` scenes made on first use (by `workers` processes ahead of time, if any) and kept."""

    def __init__(
        self, config: ModelConfig, seed: int, size: int, seconds: float = 25.6, workers: int = 0
    ) -> None:
        self.config, self.seed, self.size, self.seconds = config, seed, size, seconds
        self.ready: dict[int, Features] = {}
        self.running: dict[int, Future[Features]] = {}
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(workers, mp_context=context) if workers else None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)

    def get(self, index: int) -> Features:
        """One scene; waits for its worker, or makes it here."""
        if index not in self.ready:
            future = self.running.pop(index, None)
            arguments = self._arguments(index)
            self.ready[index] = future.result() if future is not None else features(*arguments)
        return self.ready[index]

    def prefetch(self, indices: list[int]) -> None:
        """Let the workers begin with scenes that will be needed soon."""
        if self.executor is None:
            return
        for index in indices:
            if index not in self.ready and index not in self.running:
                self.running[index] = self.executor.submit(features, *self._arguments(index))

    def _arguments(self, index: int) -> tuple[int, int, float, int]:
        return self.seed, index, self.seconds, self.config.chunk_samples


class Batches:
    """Batch n: BATCH_SCENES scenes of the pool joined into equally long streams, with noisy histories."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        pool: Pool,
        replies: Mapping[str, Reply],
        prompts: tuple[str, ...],
    ) -> None:
        self.config, self.tokenizer, self.pool = config, tokenizer, pool
        self.replies, self.prompts = replies, prompts

    def indices(self, number: int) -> list[int]:
        """Scenes of batch `number`: every epoch is another order of the whole pool."""
        found = []
        for draw in range(number * BATCH_SCENES, (number + 1) * BATCH_SCENES):
            epoch, place = divmod(draw, self.pool.size)
            order = np.random.default_rng([self.pool.seed, 1, epoch]).permutation(self.pool.size)
            found.append(int(order[place]))
        return found

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng([self.pool.seed, 2, number])
        for ahead in range(1, AHEAD // BATCH_SCENES + 1):
            self.pool.prefetch(self.indices(number + ahead))
        scenes = [self.pool.get(i) for i in self.indices(number)]
        joined = int(rng.choice([1, 2, 3], p=[0.6, 0.2, 0.2]))
        prompt = None if rng.random() < 0.6 else str(rng.choice(self.prompts))
        frames, active, sequences = [], [], []
        for first in range(0, BATCH_SCENES, joined):
            group = scenes[first : first + joined]
            gain = rng.uniform(-1.5, 0.5)  # log10 of power: -15..+5 dB
            frames.append(np.concatenate([s.raw for s in group]).astype(np.float32) + gain)
            active.append(np.concatenate([self._active(s) for s in group]))
            steps = plan(self._answers(group), len(frames[-1]), rng)
            sequences.append(build(self.config, self.tokenizer, steps, prompt))
        raw = torch.from_numpy(np.stack(frames)).clamp(min=-10.0)
        return collate(
            clamp(raw), torch.from_numpy(np.stack(active)), sequences, self.config.tokens.audio_begin
        )

    def _active(self, part: Features) -> np.ndarray:
        """int64 [chunks, A]: 1 + the index of the class heard in the middle of each audio token, or 0."""
        count = len(part.raw) * self.config.chunk_tokens
        middle_s = (np.arange(count) + 0.5) * self.config.chunk_seconds / self.config.chunk_tokens
        active = np.zeros(count, dtype=np.int64)
        for event in part.events:
            heard = (event.start_s <= middle_s) & (middle_s < event.end_s)
            active[heard] = 1 + list(self.replies).index(event.label)
        return active.reshape(len(part.raw), -1)

    def _answers(self, group: list[Features]) -> dict[int, Reply]:
        answers, offset, chunk_s = {}, 0, self.config.chunk_seconds
        for part in group:
            for event in part.events:
                at = answer_chunk(event.start_s, event.end_s, chunk_s)
                if at < len(part.raw):
                    answers[offset + at] = self.replies[event.label]
            offset += len(part.raw)
        return answers
