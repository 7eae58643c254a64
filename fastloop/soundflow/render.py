"""A planned event -> its sound, and the spans in it that are answered or ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr

from ..config import SAMPLE_RATE
from . import voices
from .clips import Clip, DataError
from .grounding import Part
from .scenes import AUDIBLE, reverb, tilt
from .sequence import Reply
from .sounds import DIGITS, GENERATORS, SYNTHETIC, Library, sound_of
from .synth import Rng, fade, samples

MARGIN_S = 0.02  # kept of a clip before and after what is heard


@dataclass(frozen=True)
class Span:
    """What is heard from start_s to end_s of a rendered event; due_s: from when an answer is due."""

    user: str
    source: str
    start_s: float
    end_s: float
    reply: Reply | None
    due_s: float


@dataclass(frozen=True)
class Rendered:
    """pcm float64 [S] at 16 kHz, at no particular level; times in seconds of it."""

    pcm: np.ndarray
    spans: tuple[Span, ...]


class Unreadable(DataError):
    """A clip of a plan cannot be read: draw another plan."""


def audible(x: np.ndarray) -> tuple[float, float]:
    """First and last time, in seconds, at which x is within 30 dB of its peak; (0, 0) for silence."""
    heard = np.flatnonzero(np.abs(x) >= max(AUDIBLE * float(np.abs(x).max(initial=0.0)), 1e-12))
    return (heard[0] / SAMPLE_RATE, (heard[-1] + 1) / SAMPLE_RATE) if len(heard) else (0.0, 0.0)


def clip_pcm(library: Library, clip: Clip) -> np.ndarray:
    """float32 [S]; Unreadable where there is none."""
    pcm = library.cache.get(clip)
    if pcm is None:
        raise Unreadable(library.cache.unreadable[clip.id])
    return pcm.astype(np.float32) / 32768


def heard_part(clip: Clip, pcm: np.ndarray, longest_s: float) -> tuple[np.ndarray, float]:
    """The clip from just before it is first heard, at most longest_s of it -> (sound, its start in the clip).

    Where it must be cut, the cut falls into a pause if there is one.
    """
    first, last = (clip.active[0][0], clip.active[-1][1]) if clip.active else audible(pcm)
    if last - first > longest_s:
        ends = [end for _, end in clip.active if first + 0.5 <= end <= first + longest_s]
        last = ends[-1] if ends else first + longest_s
    start = max(0.0, first - MARGIN_S)
    return pcm[samples(start) - 1 if start else 0 : samples(last + MARGIN_S)], start


def _faster(x: np.ndarray, speed: float) -> np.ndarray:
    """x played `speed` times as fast: shorter and higher, as another, smaller speaker."""
    return x if speed == 1.0 else soxr.resample(x, SAMPLE_RATE * speed, SAMPLE_RATE, quality="MQ")


def _words(clip: Clip, pcm: np.ndarray, speed: float) -> Rendered:
    """Speech with word times: a span for each digit, one for each run of other words."""
    start = max(0.0, clip.words[0][1] - 0.1)
    end = min(len(pcm) / SAMPLE_RATE, clip.words[-1][2] + 0.15)
    x = fade(_faster(pcm[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)], speed), 0.01)
    spans: list[Span] = []
    for word, t0, t1 in clip.words:
        a, b = (t0 - start) / speed, (t1 - start) / speed
        digit = DIGITS.get(word)
        if digit is None and spans and spans[-1].reply is None:
            a, word = spans[-1].start_s, f"{spans.pop().user} {word}"
        spans.append(Span(word, clip.id, a, b, Reply(digit) if digit else None, b))
    return Rendered(x, tuple(spans))


def _single(library: Library, source: str, word: str, part: Part) -> tuple[np.ndarray, str]:
    """One spoken digit and its word."""
    if source.startswith("espeak-ng/"):
        return voices.speak(voices.parse_voice(source), word), word
    clip = library.clip(source)
    return heard_part(clip, clip_pcm(library, clip), part.longest_s)[0], clip.text


def _string(library: Library, part: Part) -> Rendered:
    """Single digits, one after another, with pauses."""
    words: Sequence[str] = part.text.split() or [""] * len(part.sources)
    sources = part.sources * len(words) if len(part.sources) == 1 else part.sources
    pieces: list[np.ndarray] = []
    spans: list[Span] = []
    at = 0
    for source, word, pause in zip(sources, words, part.pauses_s, strict=True):
        x, word = _single(library, source, word, part)
        x = fade(_faster(np.asarray(x, dtype=np.float64), part.speed), 0.004)
        gap = np.zeros(samples(pause) if pieces else 0)
        first, last = audible(x)
        offset = (at + len(gap)) / SAMPLE_RATE
        reply = Reply(DIGITS[word])
        spans.append(Span(word, source, offset + first, offset + last, reply, offset + last))
        pieces += [gap, x]
        at += len(gap) + len(x)
    return Rendered(np.concatenate(pieces), tuple(spans))


def _dry(rng: Rng, library: Library, part: Part, room_s: float) -> Rendered:
    """The event before any room or microphone."""
    sound, source = sound_of(part.label), part.sources[0]
    if part.label == "spoken_digits" and (part.text or not library.clip(source).words):
        return _string(library, part)
    if source.startswith(SYNTHETIC):
        x = GENERATORS[source.removeprefix(SYNTHETIC)](rng, min(part.longest_s, room_s))
    else:
        clip = library.clip(source)
        pcm = clip_pcm(library, clip)
        if sound.family == "digits":
            return _words(clip, pcm, part.speed)
        x, _ = heard_part(clip, pcm, min(part.longest_s, room_s))
        x = fade(_faster(x, part.speed), 0.015)
    start, end = audible(x)
    due = min(start + sound.heard_s, end)
    return Rendered(x, (Span(sound.words, source, start, end, part.reply, due),))


def render(library: Library, part: Part, room_s: float) -> Rendered:
    """One event as a room and a microphone pass it on; at most about room_s long (strings of digits may be
    longer). Unreadable where a clip cannot be read.
    """
    rng = np.random.default_rng(part.seed)
    dry = _dry(rng, library, part, room_s)
    x = dry.pcm
    if rng.random() < (0.7 if part.sources[0].startswith((SYNTHETIC, "espeak-ng/")) else 0.35):
        x = reverb(rng, x)
    if rng.random() < 0.7:
        x = tilt(rng, x)
    spans = dry.spans
    if len(spans) == 1 and sound_of(part.label).family != "digits":  # the room's tail belongs to the event
        only = spans[0]
        end = max(only.end_s, audible(x)[1])
        spans = (Span(only.user, only.source, only.start_s, end, only.reply, only.due_s),)
    return Rendered(x, spans)
