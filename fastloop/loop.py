"""The plain loop: one session, one chunk at a time, the definition of what the engine computes.

    chunk of sound -> mel -> encoder -> decoder -> decide -> silent | respond -> text -> next chunk

It reads like the paper (arXiv 2606.05121): contiguous keys and values, only the reference
implementation of every op, no batching, no pages, no speculation. The engine is tested against it,
token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checkpoint import Model
from .config import SAMPLE_RATE
from .decision import NONFINITE, RESPOND, DecisionState, decide
from .decoder import StepRows
from .events import Decision, Event, ResponseEnd, ResponseStart, ResponseText
from .mel import MelState, log_mel, mel_chunk
from .ops.rope_append import rotate
from .options import SessionConfig
from .text import FIRST, LATER, TextStream, banned_tokens, listening_ids, offline_ids, prefix_ids
from .window import units_to_drop, window_slack


class PlainLoop:
    """One stream. `listen` takes whole chunks; `describe` one finished clip (offline mode)."""

    def __init__(self, model: Model, config: SessionConfig | None = None) -> None:
        self.model = model
        self.config = config or SessionConfig()
        c = model.config.decoder
        shape = (c.layers, 1, 1, c.kv_heads, c.head_width)
        self.keys = torch.zeros(shape, dtype=model.dtype)  # [L, 1, capacity, G, K]: one page, contiguous
        self.values = torch.zeros(shape, dtype=model.dtype)
        self.length = 0  # positions in the cache
        self.dropped = 0  # positions the window has dropped
        self.units: list[int] = []  # positions of each kept unit
        self.mel = MelState.empty(1)
        self.decisions = DecisionState(1)
        self.decisions.reset(0, self.config.policy, model.config)
        self.banned = banned_tokens(model.config)
        self.pending: list[int] = []
        self.chunks = 0
        self.clip_seconds = 0.0  # offline mode: the stream time of every event
        self.events: list[Event] = []
        prefix = prefix_ids(model.config, model.tokenizer, self.config.mode, self.config.system_prompt)
        self.prefix_len = len(prefix)
        self._forward(prefix)
        self.pristine = self.keys[:, :, : self.prefix_len].clone()

    @torch.inference_mode()
    def listen(self, pcm: Tensor, interrupt_after: int | None = None) -> list[Event]:
        """One chunk, float32 [S]: decide, and respond if so decided (at most `interrupt_after` tokens)."""
        with ops.use_backend("reference"):
            said = len(self.events)
            frames = mel_chunk(self.mel, torch.zeros(1, dtype=torch.int64), pcm[None], edge=self.config.edge)
            tokens = self.model.encoder.encode(frames)[0]
            ids = [*self.pending, *listening_ids(self.model.config)]
            self._make_room(len(ids))
            hidden = self._forward(ids, tokens, len(ids) - 1 - len(tokens))
            self.units.append(len(ids))
            slot = torch.zeros(1, dtype=torch.int64)
            p, decision = decide(self.model.decoder, hidden[-1:], slot, self.decisions)
            assert int(decision) != NONFINITE, "the logits are not finite"
            respond = int(decision) == RESPOND
            self.chunks += 1
            verdict = "respond" if respond else "silent"
            self._emit(Decision, chunk=self.chunks - 1, decision=verdict, p_respond=float(p))
            t = self.model.config.tokens
            self.pending = [t.text_begin if respond else t.keep_silence]
            if respond:
                self._respond(interrupt_after)
            return self.events[said:]

    @torch.inference_mode()
    def describe(self, pcm: Tensor, interrupt_after: int | None = None) -> list[Event]:
        """A finished clip, float32 [S], S a multiple of 640 (offline mode)."""
        with ops.use_backend("reference"):
            tokens = self.model.encoder.encode_offline(log_mel(pcm))
            text = self.config.user_text
            self.pending = offline_ids(self.model.config, self.model.tokenizer, len(tokens), text)
            self.clip_seconds = pcm.shape[0] / SAMPLE_RATE
            self._respond(interrupt_after, tokens)
            return self.events

    def _respond(self, interrupt_after: int | None, clip: Tensor | None = None) -> None:
        """Draw text tokens until TEXT_END, the length limit, or the interrupt."""
        t, stream = self.model.config.tokens, TextStream(self.model.tokenizer)
        names = {token: name for name, token in t.emotions.items()}
        self.units = self.units or [0]
        spoken, reason = 0, "interrupt"
        while interrupt_after is None or spoken < interrupt_after:
            self.units[-1] += len(self.pending)
            hidden = self._forward(self.pending, clip, 1)
            clip = None
            token = self._draw(hidden[-1:], FIRST if spoken == 0 else LATER)
            spoken += 1
            self.pending = [token]
            if spoken == 1:
                self._emit(ResponseStart, emotion=names.get(token))
            if token == t.text_end:
                reason = "end"
                break
            if not (spoken == 1 and token in names):
                self._say(stream.push(token))
            if spoken >= self.config.max_response_tokens:
                reason = "length"
                break
        if spoken == 0:
            self._emit(ResponseStart, emotion=None)
        if reason != "interrupt":
            self._say(stream.finish())
        if reason != "end":
            self.pending = [*self.pending, t.text_end]
        self._emit(ResponseEnd, text=stream.text, reason=reason)

    def _draw(self, hidden: Tensor, phase: int) -> int:
        """hidden [1, D] -> one id, by the session's sampling and the row's position."""
        s, one = self.config.sampling, torch.ones(1, dtype=torch.int64)
        logits = self.model.decoder.logits(hidden)
        position = self.length + self.dropped - 1
        drawn = ops.sample(
            logits,
            self.banned,
            one * phase,
            torch.tensor([s.temperature], dtype=torch.float32),
            one * s.top_k,
            torch.tensor([s.top_p], dtype=torch.float32),
            one * self.config.seed,
            one * position,
        )
        return int(drawn)

    def _forward(self, ids: Sequence[int], audio: Tensor | None = None, first: int = 0) -> Tensor:
        """Append ids (audio tokens [n, D] in place of those from `first` on) -> hidden [rows, D]."""
        with ops.use_backend("reference"):
            count = len(ids)
            self._grow(self.length + count)
            x = self.model.decoder.embed(torch.tensor(ids))
            if audio is not None:
                x[first : first + len(audio)] = audio
            slots = self.length + torch.arange(count)
            self.length += count
            rows = StepRows(
                positions=slots + self.dropped,
                slots=slots,
                row_starts=torch.tensor([0, count], dtype=torch.int32),
                block_table=torch.zeros(1, 1, dtype=torch.int32),
                kv_lens=torch.tensor([self.length], dtype=torch.int32),
                gaps=torch.zeros(1, 2, dtype=torch.int32),
            )
            return self.model.decoder.forward(x, rows, self.keys, self.values)

    def _grow(self, length: int) -> None:
        """Room for `length` positions; capacity doubles."""
        capacity = self.keys.shape[2]
        while capacity < length:
            capacity *= 2
        if capacity > self.keys.shape[2]:
            more = (0, 0, 0, 0, 0, capacity - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, more)
            self.values = torch.nn.functional.pad(self.values, more)

    def _make_room(self, rows: int) -> None:
        """The window (fastloop.window): drop the oldest units, rotate the prefix forward."""
        model, window = self.model.config, self.config.window_tokens(self.model.config)
        count = units_to_drop(self.units, rows, window, window_slack(model))
        if not count:
            return
        gone, self.units = sum(self.units[:count]), self.units[count:]
        low = self.prefix_len
        for cache in (self.keys, self.values):
            cache[:, :, low : self.length - gone] = cache[:, :, low + gone : self.length].clone()
        self.length -= gone
        self.dropped += gone
        flat = self.pristine.reshape(1, -1, self.pristine.shape[-1])
        shift = torch.tensor([self.dropped])
        self.keys[:, :, :low] = rotate(flat, shift, self.model.decoder.inv_freq).view_as(self.pristine)

    def _say(self, text: str) -> None:
        if text:
            self._emit(ResponseText, text=text)

    def _emit(self, kind: type[Event], **values: Any) -> None:
        t = self.clip_seconds or self.chunks * self.model.config.chunk_seconds
        self.events.append(kind(seq=len(self.events), epoch=0, t=t, **values))
