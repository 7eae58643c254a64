"""What sessions cost in bytes, from configurations alone: before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import ModelConfig
from ..options import EngineConfig, SessionConfig
from .kv_cache import pages_for
from .kv_layout import slot_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes an engine needs: before anything is allocated, from the configuration alone."""

    sessions: int
    weights_bytes: int
    kv_bytes_per_session: int
    prefix_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        per_session = self.sessions * self.kv_bytes_per_session
        return self.weights_bytes + per_session + self.prefix_bytes + self.workspace_bytes

    def __str__(self) -> str:
        return (
            f"{self.sessions} sessions: {_mb(self.total_bytes)} MB = weights {_mb(self.weights_bytes)}"
            f" + KV {self.sessions} x {_mb(self.kv_bytes_per_session)} + prefix {_mb(self.prefix_bytes)}"
            f" + workspace {_mb(self.workspace_bytes)}"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def session_pages(
    model: ModelConfig, engine: EngineConfig, config: SessionConfig, prompt_tokens: tuple[int, int]
) -> int:
    """The most pages a session can hold: its stream and a private copy of the prefix; 0 without a bound."""
    most = config.most_tokens(model, prompt_tokens[1])
    if most is None:
        return 0
    page = engine.page_tokens
    return pages_for(most, page) + 1 + pages_for(prompt_tokens[0], page)


def memory_plan(
    model: ModelConfig,
    weight_bytes: int,
    dtype: torch.dtype,
    sessions: int,
    engine: EngineConfig | None = None,
    config: SessionConfig | None = None,
    prompt_tokens: tuple[int, int] = (64, 0),
) -> MemoryPlan:
    """What `sessions` sessions need, from configurations alone (`fastloop doctor` prints it)."""
    if isinstance(sessions, bool) or not isinstance(sessions, int) or sessions < 1:
        raise ValueError(f"memory_plan: sessions must be a positive integer, got {sessions!r}")
    engine, config = engine or EngineConfig(), config or SessionConfig()
    c, itemsize = model.decoder, max(2, dtype.itemsize)  # int8 is of pages only
    if config.mode == "online" and config.window_s is None:
        config = SessionConfig(max_response_tokens=config.max_response_tokens)
    page_bytes = 2 * c.layers * engine.page_tokens * slot_bytes(c, dtype)
    pages = session_pages(model, engine, config, prompt_tokens)
    rows = min(engine.max_step_rows, sessions * model.chunk_rows * config.speculative_chunks)
    widest = max(2 * c.ffn, c.qkv_rows, c.width)
    positions = min(engine.max_perceive_chunks, sessions) * model.chunk_frames
    encoder = positions * (model.encoder.ffn + 4 * model.encoder.width)
    workspace = (rows * (widest + 4 * c.width) + sessions * c.vocab_padded + encoder) * itemsize
    return MemoryPlan(
        sessions=sessions,
        weights_bytes=weight_bytes,
        kv_bytes_per_session=pages * page_bytes,
        prefix_bytes=pages_for(prompt_tokens[0], engine.page_tokens) * page_bytes,
        workspace_bytes=workspace,
    )
