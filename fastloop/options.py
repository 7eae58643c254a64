"""What a caller can choose: decision policy, text sampling, session and engine options.

Frozen and validated like the model's configuration; an error names the field.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from .config import ConfigError, ModelConfig
from .window import window_slack

EDGES = ("reflect", "wait")
MODES = ("online", "offline")
RUNNERS = ("auto", "eager", "native", "captured")
ADMISSIONS = ("fifo", "deadline")
PRECISIONS = ("auto", "float32", "bfloat16", "int8", "int4")
KV_PRECISIONS = ("auto", "float32", "bfloat16", "int8", "fp8")


def _range(where: str, name: str, value: Any, low: float, high: float, kind: Any) -> None:
    ok = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    if not ok:
        raise ConfigError(f"{where}.{name}: must be between {low:g} and {high:g}, got {value!r}")


def _choice(where: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{where}.{name}: choose from {choices}, got {value!r}")


_NUMBER = (int, float)


@dataclass(frozen=True)
class DecisionPolicy:
    """When p(respond) becomes a response. The default is what the checkpoint says.

    threshold: respond when p(respond) is above it (0..1; 0.5 is the argmax of the two control logits). None
        takes the checkpoint's own.
    rearm: hysteresis: after a response, p(respond) must first fall to it (1: no hysteresis).
    min_gap_s: least stream time between two responses, seconds.
    """

    threshold: float | None = None
    rearm: float = 1.0
    min_gap_s: float = 0.0

    def __post_init__(self) -> None:
        if self.threshold is not None:
            _range("DecisionPolicy", "threshold", self.threshold, 0, 1, _NUMBER)
        _range("DecisionPolicy", "rearm", self.rearm, 0, 1, _NUMBER)
        _range("DecisionPolicy", "min_gap_s", self.min_gap_s, 0, 86_400, _NUMBER)

    def row(self, model: ModelConfig) -> tuple[float, float, float]:
        """The row of the op `decide`: (threshold, rearm, min_gap in chunks)."""
        threshold = model.threshold if self.threshold is None else self.threshold
        return threshold, self.rearm, math.ceil(self.min_gap_s / model.chunk_seconds - 1e-9)


@dataclass(frozen=True)
class Sampling:
    """How text tokens are drawn. The default, temperature 0, is greedy; the published programs are greedy
    offline and sampled live. Decisions are never sampled.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        _range("Sampling", "temperature", self.temperature, 0, 100, _NUMBER)
        _range("Sampling", "top_k", self.top_k, 0, 2**31, int)
        _range("Sampling", "top_p", self.top_p, 0, 1, _NUMBER)
        if self.top_p == 0:
            raise ConfigError("Sampling.top_p: must be above 0; use temperature=0 for greedy text")


_SURROGATES = re.compile("[\ud800-\udfff]")


def _is_text(value: object) -> bool:
    """Text that a tokenizer takes: no halves of surrogates, as undecodable bytes of a command line become."""
    return isinstance(value, str) and _SURROGATES.search(value) is None


@dataclass(frozen=True)
class SessionConfig:
    """One stream's options.

    mode: "online" listens chunk by chunk; "offline" takes one finished clip (push, then flush).
    system_prompt: None takes the checkpoint's own.
    user_text: offline only, a question about the clip.
    edge: "reflect" decides at once; "wait" waits for 2.5 ms more sound (see fastloop.mel).
    window_s: seconds of listening kept in the KV cache behind the pinned prefix; None keeps everything
        and gives up the guarantee that the pool cannot run out under the session.
    speculative_chunks: at most so many queued chunks go through the decoder in one step.
    max_queued_s: bound of the input queue; a push beyond it is refused whole.
    max_events: while so many events wait to be polled, the session is not advanced (back-pressure).
    seed: of the sampled text; same seed, same sound, same text, alone or in any batch.
    """

    mode: str = "online"
    system_prompt: str | None = None
    user_text: str | None = None
    edge: str = "reflect"
    policy: DecisionPolicy = field(default_factory=DecisionPolicy)
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_response_tokens: int = 256
    window_s: float | None = 60.0
    speculative_chunks: int = 8
    max_queued_s: float = 30.0
    max_events: int = 4096

    def __post_init__(self) -> None:
        where = "SessionConfig"
        if self.mode not in MODES:
            raise ConfigError(f"{where}.mode: choose from {MODES}, got {self.mode!r}")
        if self.edge not in EDGES:
            raise ConfigError(f"{where}.edge: choose from {EDGES}, got {self.edge!r}")
        for name in ("system_prompt", "user_text"):
            if not ((value := getattr(self, name)) is None or _is_text(value)):
                raise ConfigError(f"{where}.{name}: must be Unicode text or None, got {value!r}")
        for name, kind in (("policy", DecisionPolicy), ("sampling", Sampling)):
            if not isinstance(value := getattr(self, name), kind):
                raise ConfigError(f"{where}.{name}: must be a {kind.__name__}, got {value!r}")
        if self.user_text is not None and self.mode != "offline":
            raise ConfigError(f"{where}.user_text: only an offline session takes a text; set mode='offline'")
        _range(where, "seed", self.seed, 0, 2**63 - 1, int)
        _range(where, "max_response_tokens", self.max_response_tokens, 1, 65_536, int)
        if self.window_s is not None:
            _range(where, "window_s", self.window_s, 0.1, 864_000, _NUMBER)
        _range(where, "speculative_chunks", self.speculative_chunks, 1, 1024, int)
        _range(where, "max_queued_s", self.max_queued_s, 0.1, 86_400, _NUMBER)
        _range(where, "max_events", self.max_events, 8, 2**31, int)

    def window_tokens(self, model: ModelConfig) -> int | None:
        """The window in decoder positions: whole listening steps."""
        if self.window_s is None:
            return None
        return max(1, math.ceil(self.window_s / model.chunk_seconds - 1e-9)) * model.chunk_rows

    def offline_tokens(self, model: ModelConfig) -> int:
        """Audio positions of the longest clip the queue can hold."""
        return math.ceil(self.max_queued_s / model.chunk_seconds) * model.chunk_tokens

    def most_tokens(self, model: ModelConfig, text_tokens: int = 0) -> int | None:
        """The most stream positions the session can hold at once, or None (no bound)."""
        spoken = self.max_response_tokens + 2
        if self.mode == "offline":
            return self.offline_tokens(model) + text_tokens + 8 + spoken
        window = self.window_tokens(model)
        return None if window is None else window + window_slack(model) + model.chunk_rows + 2 + spoken


@dataclass(frozen=True)
class EngineConfig:
    """How many sessions run; never what they compute.

    kv_pages: pages of the KV pool; None sizes it so that max_sessions default sessions fit.
    page_tokens: token slots in a page (Q).
    max_step_rows: rows of one ragged decoder step; a single longer item still runs, alone.
    max_perceive_chunks: chunks encoded in one step.
    admission: who is perceived and enters a step first: "fifo", or "deadline": earliest deadline first, with
        a floor rate for responses (fastloop.engine.admission).
    cohort_s: how long a chunk may wait for others to share its step, seconds (AsyncEngine, Engine.begin_at);
        None: 2 ms where the weights' traffic decides (the captured runner), elsewhere no time at all.
    runner: "native" (compiled, CPU), "eager" (op by op), "captured" (graphs replayed from fixed buffers; on
        the CPU a recording of them, for tests), or "auto": captured on a GPU, native on the CPU
        where it is built, else eager.
    precision: of the weights, native only: "float32", "bfloat16", "int8", "int4"; "auto" keeps the
        checkpoint's.
    kv_precision: of the KV pages. Natively "float32", "bfloat16", or "int8", half of bfloat16's memory, which
        takes page_tokens in multiples of 64 and heads in multiples of 32 channels; "auto": float32 beside
        float32 weights, else bfloat16. On a GPU (sm_89 and newer) "fp8", half of bfloat16's memory; "auto":
        the model's dtype.
    threads: of the native runner; None takes torch's number.
    single_stream: whether, while one session alone is open, its responses run as loops of the device (a WHILE
        node in a CUDA graph; fastloop.engine.reply). Captured runner only; ConfigError where that cannot be.
    ahead: whether a step is begun before the results of the one before it are taken, where the runner can
        ("captured"); the results are the same.
    """

    max_sessions: int = 8
    kv_pages: int | None = None
    page_tokens: int = 64
    max_step_rows: int = 1024
    max_perceive_chunks: int = 64
    admission: str = "fifo"
    cohort_s: float | None = None
    runner: str = "auto"
    precision: str = "auto"
    kv_precision: str = "auto"
    threads: int | None = None
    single_stream: bool = False
    ahead: bool = True

    def __post_init__(self) -> None:
        where = "EngineConfig"
        _range(where, "max_sessions", self.max_sessions, 1, 100_000, int)
        if self.kv_pages is not None:
            _range(where, "kv_pages", self.kv_pages, 1, 2**31, int)
        _range(where, "page_tokens", self.page_tokens, 1, 4096, int)
        _range(where, "max_step_rows", self.max_step_rows, 1, 2**20, int)
        _range(where, "max_perceive_chunks", self.max_perceive_chunks, 1, 2**20, int)
        _choice(where, "admission", self.admission, ADMISSIONS)
        if self.cohort_s is not None:
            _range(where, "cohort_s", self.cohort_s, 0, 0.1, _NUMBER)
        _choice(where, "runner", self.runner, RUNNERS)
        _choice(where, "precision", self.precision, PRECISIONS)
        _choice(where, "kv_precision", self.kv_precision, KV_PRECISIONS)
        if self.threads is not None:
            _range(where, "threads", self.threads, 1, 256, int)
        for flag in ("single_stream", "ahead"):
            if not isinstance(value := getattr(self, flag), bool):
                raise ConfigError(f"{where}.{flag}: must be true or false, got {value!r}")
        for name, kept in (("precision", ("auto",)), ("kv_precision", ("auto", "fp8"))):
            if getattr(self, name) not in kept and self.runner in ("eager", "captured"):
                raise ConfigError(
                    f"{where}.{name}: the {self.runner} runner keeps the checkpoint's; leave it at 'auto'"
                )
        if self.kv_precision == "fp8" and self.runner == "native":
            raise ConfigError(f"{where}.kv_precision: the native runner has no fp8 pages; choose int8")
