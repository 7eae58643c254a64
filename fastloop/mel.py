"""Sound -> log-mel frames: chunk by chunk (`mel_chunk`), in pushes of any size (`MelStream`), or a whole
clip (`log_mel`). One frame is 128 bins every 10 ms, normalised as Whisper's.

Per stream and chunk the work is the same however long the stream is (see fastloop.ops.mel).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import HOP_SAMPLES, MEL_BINS
from .ops.mel import CLAMPS, EDGES, LOOKAHEAD_SAMPLES, TAIL_SAMPLES, mel, mel_filters

SILENT_PEAK = -torch.inf  # no frame yet


@dataclass
class MelState:
    """What Z streams carry from chunk to chunk; changed in place."""

    tail: Tensor  # float32 [Z, 360]: the last samples
    peak: Tensor  # float32 [Z]: loudest log10 mel power of the final frames
    seen: Tensor  # int64 [Z]: samples so far

    @classmethod
    def empty(cls, slots: int, device: torch.device | str = "cpu") -> MelState:
        """State of `slots` streams that have not begun."""
        return cls(
            tail=torch.zeros(slots, TAIL_SAMPLES, device=device),
            peak=torch.full((slots,), SILENT_PEAK, device=device),
            seen=torch.zeros(slots, dtype=torch.int64, device=device),
        )

    def reset(self, mask: Tensor) -> None:
        """Begin anew where mask (bool [Z]) holds, in place."""
        if mask.dtype != torch.bool or mask.shape != self.peak.shape:
            raise ValueError(
                f"MelState.reset: mask must be bool [{len(self.peak)}], got {mask.dtype} {list(mask.shape)}"
            )
        self.tail.masked_fill_(mask[:, None], 0)
        self.peak.masked_fill_(mask, SILENT_PEAK)
        self.seen.masked_fill_(mask, 0)

    def prime(self, slot: int, pcm: Tensor) -> None:
        """edge="wait": the first 40 samples (float32 [40]) of the stream in `slot`; they give no frame."""
        if pcm.shape != (LOOKAHEAD_SAMPLES,):
            raise ValueError(f"MelState.prime: pcm must be [{LOOKAHEAD_SAMPLES}], got {list(pcm.shape)}")
        if int(self.seen[slot]):
            raise ValueError(
                f"MelState.prime: slot {slot} has seen {int(self.seen[slot])} samples; "
                "prime a fresh stream, once"
            )
        self.tail[slot, -LOOKAHEAD_SAMPLES:] = pcm
        self.seen[slot] = LOOKAHEAD_SAMPLES

    def export(self, slot: int) -> dict[str, Tensor]:
        """A copy of one stream's state on the CPU: tail [360], peak [], seen []."""
        return {name: getattr(self, name)[slot].detach().cpu().clone() for name in ("tail", "peak", "seen")}

    def load(self, slot: int, values: dict[str, Tensor]) -> None:
        """Put an exported stream into a slot; ValueError where it does not fit, and nothing is changed."""
        own = {name: getattr(self, name)[slot] for name in ("tail", "peak", "seen")}
        if set(values) != set(own):
            raise ValueError(f"MelState.load: needs {sorted(own)}, got {sorted(values)}")
        for name, target in own.items():
            value = values[name]
            if value.shape != target.shape or value.dtype != target.dtype:
                raise ValueError(
                    f"MelState.load: {name} must be {target.dtype} {list(target.shape)}, "
                    f"got {value.dtype} {list(value.shape)}"
                )
        for name, target in own.items():
            target.copy_(values[name])


def mel_chunk(
    state: MelState, slots: Tensor, pcm: Tensor, edge: str = "reflect", clamp: str = "running"
) -> Tensor:
    """One chunk of each of B streams: pcm float32 [B, S], S a multiple of 160, slots int64 [B] (distinct)
    -> frames float32 [B, S / 160, C]; the streams in `slots` move on, no other is touched.

    edge="reflect" gives the last frame at once (its last 2.5 ms mirrored); edge="wait" needs a stream that
    was primed with its first 40 samples, and every frame is final. ValueError or TypeError on bad arguments.
    """
    if pcm.dim() == 2 and pcm.shape[1] % HOP_SAMPLES:
        raise ValueError(f"mel_chunk: a chunk is a multiple of {HOP_SAMPLES} samples, got {pcm.shape[1]}")
    filters, bands = mel_filters(pcm.device)
    return mel(pcm, slots, state.tail, state.peak, state.seen, filters, bands, edge, clamp)


def log_mel(pcm: Tensor) -> Tensor:
    """A finished clip: pcm float32 [S] or [B, S] -> frames float32 [S // 160, C] or [B, S // 160, C].

    Equals openai-whisper's `log_mel_spectrogram(pcm, n_mels=128)` (transposed): every frame is clamped by
    the loudest of the whole clip. Clips of 160 to 200 samples, where torch's reflect padding gives up, are
    mirrored as often as it takes (numpy's `reflect`); below 160 samples there is no frame. ValueError where
    the clip is empty, TypeError where it is not float32.
    """
    if pcm.dim() not in (1, 2) or pcm.numel() == 0:
        raise ValueError(f"log_mel: pcm must be [S] or [B, S] and not empty, got {list(pcm.shape)}")
    if pcm.dtype != torch.float32:
        raise TypeError(f"log_mel: pcm must be float32 (full scale 1.0), got {pcm.dtype}")
    rows = pcm if pcm.dim() == 2 else pcm[None]
    if rows.shape[1] < HOP_SAMPLES:
        return pcm.new_empty(*pcm.shape[:-1], 0, MEL_BINS)
    state = MelState.empty(len(rows), pcm.device)
    filters, bands = mel_filters(pcm.device)
    slots = torch.arange(len(rows), device=pcm.device)
    frames = mel(rows, slots, state.tail, state.peak, state.seen, filters, bands)
    return frames if pcm.dim() == 2 else frames[0]


class MelStream:
    """Pushes of any size, down to one sample, into Z streams; frames come out in whole chunks.

    Args:
        streams: Z, how many streams.
        chunk_frames: frames of a chunk (10 ms each): 20, 40, 80.
        edge: "reflect" or "wait"; see fastloop.ops.mel. "wait" takes the first 40 samples as lookahead.
        clamp: "running" clamps by the loudest frame so far; "global" by `peak`.
        peak: clamp="global" only: the loudest log10 mel power of the whole sound, float or float32 [Z]; where
            the clip is known beforehand, `4 * log_mel(clip).amax() - 4`.
    """

    def __init__(
        self,
        streams: int = 1,
        chunk_frames: int = 40,
        edge: str = "reflect",
        clamp: str = "running",
        peak: float | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if streams < 1 or chunk_frames < 1:
            raise ValueError(
                f"MelStream: streams={streams} and chunk_frames={chunk_frames} must be at least 1"
            )
        if edge not in EDGES or clamp not in CLAMPS:
            raise ValueError(f"MelStream: edge={edge!r} clamp={clamp!r}; choose from {EDGES} and {CLAMPS}")
        if (peak is None) != (clamp == "running"):
            raise ValueError("MelStream: clamp='global' needs peak, clamp='running' takes none")
        self.edge = edge
        self.clamp = clamp
        self.chunk_samples = chunk_frames * HOP_SAMPLES
        self.state = MelState.empty(streams, device)
        self.known_peak = torch.as_tensor(
            SILENT_PEAK if peak is None else peak, dtype=torch.float32, device=self.state.peak.device
        ).expand(streams)
        self.pending = torch.zeros(streams, self.chunk_samples, device=device)  # samples short of a chunk
        self.waiting = [0] * streams  # how many of them
        self.received = [0] * streams  # samples so far, padding included
        self.flushed = [0] * streams  # `received` after the last flush
        self.reset(torch.ones(streams, dtype=torch.bool))

    def reset(self, mask: Tensor) -> None:
        """Begin anew where mask (bool [Z]) holds."""
        self.state.reset(mask.to(self.state.peak.device))
        torch.where(mask.to(self.state.peak.device), self.known_peak, self.state.peak, out=self.state.peak)
        for z in mask.nonzero().flatten().tolist():
            self.waiting[z] = self.received[z] = self.flushed[z] = 0

    def push(self, pcm: Tensor, streams: Tensor | None = None) -> list[Tensor]:
        """pcm float32 [B, n], any n, for `streams` (distinct int64 [B] or bool [Z]; None: all)
        -> per stream the frames of the chunks it completed, float32 [F, C], F = 0, chunk_frames, ...
        """
        rows = self._rows(streams)
        if pcm.dim() != 2 or len(pcm) != len(rows):
            raise ValueError(f"MelStream.push: pcm must be [{len(rows)}, n], got {list(pcm.shape)}")
        if pcm.dtype != torch.float32:
            raise TypeError(f"MelStream.push: pcm must be float32 (full scale 1.0), got {pcm.dtype}")
        done: list[list[Tensor]] = [[] for _ in rows]
        begin = 0
        while begin < pcm.shape[1]:
            # No stream's buffer overflows: as many samples as the fullest one takes.
            count = min(pcm.shape[1] - begin, *(self._need(z) - self.waiting[z] for z in rows))
            for row, z in enumerate(rows):
                self.pending[z, self.waiting[z] : self.waiting[z] + count] = pcm[row, begin : begin + count]
                self.waiting[z] += count
            self._emit(rows, done)
            for z in rows:
                self.received[z] += count
            begin += count
        none = self.pending.new_empty(0, MEL_BINS)
        return [torch.cat([none, *chunks]) for chunks in done]

    def flush(self, streams: Tensor | None = None) -> list[Tensor]:
        """Complete a partial chunk with zeros, so that every sample pushed has its frames; the stream goes on
        behind the zeros. Nothing new since the last flush: no frames. Returns as `push`.
        """
        lead, frames = self._lead(), []
        for z in self._rows(streams):
            missing = 0
            if self.received[z] > self.flushed[z]:
                whole = -(-self.received[z] // self.chunk_samples) * self.chunk_samples
                missing = whole + lead - self.received[z]
            zeros = self.pending.new_zeros(1, missing)
            frames += self.push(zeros, torch.tensor([z]))
            self.flushed[z] = self.received[z]
        return frames

    def _lead(self) -> int:
        return LOOKAHEAD_SAMPLES if self.edge == "wait" else 0

    def _need(self, z: int) -> int:
        """Samples that the next call for stream z takes: the lookahead first, then chunks."""
        return self._lead() if self.received[z] < self._lead() else self.chunk_samples

    def _rows(self, streams: Tensor | None) -> list[int]:
        count = len(self.waiting)
        if streams is None:
            return list(range(count))
        if streams.dtype == torch.bool and streams.shape == (count,):
            return streams.nonzero().flatten().tolist()
        rows = streams.tolist() if streams.dtype == torch.int64 and streams.dim() == 1 else None
        if rows is None or len(set(rows)) < len(rows) or not all(0 <= z < count for z in rows):
            raise ValueError(
                f"MelStream: streams must be bool [{count}] or distinct int64 below {count}, got {streams}"
            )
        return rows

    def _emit(self, rows: list[int], done: list[list[Tensor]]) -> None:
        """Run what is complete: one call for all streams that have a whole chunk."""
        full = [(row, z) for row, z in enumerate(rows) if self.waiting[z] == self._need(z)]
        chunks = [(row, z) for row, z in full if self._need(z) == self.chunk_samples]
        for _, z in full:
            self.waiting[z] = 0
        for _, z in set(full) - set(chunks):
            self.state.prime(z, self.pending[z, : self._lead()])
        if chunks:
            slots = torch.tensor([z for _, z in chunks], device=self.pending.device)
            frames = mel_chunk(self.state, slots, self.pending[slots], self.edge, self.clamp)
            for (row, _), chunk in zip(chunks, frames, strict=True):
                done[row].append(chunk)
