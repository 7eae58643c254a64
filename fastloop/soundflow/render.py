"""A planned event -> its sound, and the spans in it that are answered or ignored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import soxr

from ..config import SAMPLE_RATE
from . import voices
from .clips import Clip
from .grounding import Part
from .scenes import AUDIBLE, reverb, tilt
from .sequence import Reply
from .sounds import DIGITS, GENERATORS, SYNTHETIC, Library, sound_of
from .synth import Rng, fade, samples

WEAKEST = 0.0056  # of its peak, the weakest that belongs to a spoken word (-45 dB): the s of six
SETTLE_S = 0.12  # words and short sounds are answered so long after their end: only then it is sure to be one
MARGIN_S = 0.02  # kept of a clip before and after what is heard
CUT_S = 1.0  # a sound that is too long is cut in the quietest place of its last second


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

    @property
    def end_s(self) -> float:
        return max(span.end_s for span in self.spans)


def audible(x: np.ndarray, part: float = AUDIBLE) -> tuple[float, float]:
    """First and last time, in seconds, at which x is at least `part` of its peak; (0, 0) for silence."""
    heard = np.flatnonzero(np.abs(x) >= max(part * float(np.abs(x).max(initial=0.0)), 1e-12))
    return (heard[0] / SAMPLE_RATE, (heard[-1] + 1) / SAMPLE_RATE) if len(heard) else (0.0, 0.0)


def shortened(x: np.ndarray, longest_s: float) -> np.ndarray:
    """x, or at most longest_s of it: cut where a block of 20 ms near the end is quietest."""
    most = samples(longest_s)
    if len(x) <= most:
        return x
    first = max(most // 2, most - samples(CUT_S))
    blocks = x[first:most][: (most - first) // 320 * 320].reshape(-1, 320)
    return x[: first + 320 * (int(np.argmin(np.square(blocks).sum(axis=1))) + 1)] if len(blocks) else x[:most]


def clip_sound(library: Library, clip: Clip, tfjp: bool) -> np.ndarray:
    """What is heard of a clip, with a little around it, float32 [S]; with tfjp, prepared, whole half chunks.

    Transcribed speech is never prepared: it is cut well already, has few pauses to hear noise in, and its
    weakest consonants lie 30 dB below the vowels, so that denoising and a search for the core eat them (of
    the s of spoken sixes, nearly half was lost). Unreadable where the clip cannot be read.
    """
    if tfjp and not clip.text:
        return library.prepared(clip)[0]
    pcm = library.pcm(clip)
    if clip.text and not clip.active:
        return pcm
    first_s, last_s = (clip.active[0][0], clip.active[-1][1]) if clip.active else audible(pcm)
    margin = samples(MARGIN_S)
    return pcm[max(0, round(first_s * SAMPLE_RATE) - margin) : round(last_s * SAMPLE_RATE) + margin]


def _faster(x: np.ndarray, speed: float) -> np.ndarray:
    """x played `speed` times as fast: shorter and higher, as another, smaller speaker."""
    return x if speed == 1.0 else soxr.resample(x, SAMPLE_RATE * speed, SAMPLE_RATE, quality="MQ")


def _words(library: Library, clip: Clip, speed: float) -> Rendered:
    """Speech with word times: a span for each digit, one for each run of other words."""
    pcm = library.pcm(clip)
    start = max(0.0, clip.words[0][1] - 0.1)
    end = min(len(pcm) / SAMPLE_RATE, clip.words[-1][2] + 0.15)
    x = fade(_faster(pcm[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)], speed), 0.01)
    spans: list[Span] = []
    for word, t0, t1 in clip.words:
        a, b = (t0 - start) / speed, (t1 - start) / speed
        digit = DIGITS.get(word)
        if digit is None and spans and spans[-1].reply is None:
            a, word = spans[-1].start_s, f"{spans.pop().user} {word}"
        spans.append(Span(word, clip.id, a, b, Reply(digit) if digit else None, b + SETTLE_S))
    return Rendered(x, tuple(spans))


def _string(library: Library, part: Part) -> Rendered:
    """Single digits, one after another, with pauses."""
    words = part.text.split() or [library.clip(source).text for source in part.sources]
    sources = part.sources * len(words) if part.text else part.sources
    pieces: list[np.ndarray] = []
    spans: list[Span] = []
    at = 0
    for source, word, pause in zip(sources, words, part.pauses_s, strict=True):
        if voices.is_voice(source):
            x = voices.speak(voices.parse_voice(source), word)
        else:
            x = clip_sound(library, library.clip(source), tfjp=False)
        x = fade(_faster(np.asarray(x, dtype=np.float64), part.speed), 0.004)
        gap = samples(pause) if pieces else 0
        first, last = audible(x, WEAKEST)
        begin = (at + gap) / SAMPLE_RATE
        due = begin + last + SETTLE_S
        spans.append(Span(word, source, begin + first, begin + last, Reply(DIGITS[word]), due))
        pieces += [np.zeros(gap), x]
        at += gap + len(x)
    return Rendered(np.concatenate(pieces), tuple(spans))


def _dry(rng: Rng, library: Library, part: Part, room_s: float, tfjp: bool) -> Rendered:
    """The event before any room or microphone."""
    sound, source = sound_of(part.label), part.sources[0]
    if part.label == "spoken_digits" and (part.text or not library.clip(source).words):
        return _string(library, part)
    if sound.family == "digits":
        return _words(library, library.clip(source), part.speed)
    user, longest = sound.words, min(part.longest_s, room_s)
    if part.text:
        user = part.text
        x = np.asarray(voices.speak(voices.parse_voice(source), part.text), dtype=np.float64)
    elif source.startswith(SYNTHETIC):
        x = GENERATORS[source.removeprefix(SYNTHETIC)](rng, longest)
    else:
        clip = library.clip(source)
        user = clip.text or user
        x = fade(_faster(shortened(clip_sound(library, clip, tfjp), longest), part.speed), 0.015)
    start, end = audible(x, WEAKEST if part.text else AUDIBLE)
    due = end + SETTLE_S if part.text else min(start + sound.heard_s, end + SETTLE_S)
    return Rendered(x, (Span(user, source, start, end, part.reply, due),))


def render(library: Library, part: Part, room_s: float, tfjp: bool = True) -> Rendered:
    """One event as a room and a microphone pass it on; a sound is at most about room_s long, what is said
    may be longer. Unreadable where a clip cannot be read.
    """
    rng = np.random.default_rng(part.seed)
    dry = _dry(rng, library, part, room_s, tfjp)
    x = dry.pcm
    if rng.random() < (0.7 if part.generated else 0.35):
        x = reverb(rng, x)
    if rng.random() < 0.7:
        x = tilt(rng, x)
    spans = dry.spans
    if sound_of(part.label).family != "digits" and not part.text:  # the room's tail belongs to the event
        spans = (replace(spans[0], end_s=max(spans[0].end_s, audible(x)[1])),)
    return Rendered(x, spans)
