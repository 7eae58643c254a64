"""Is a composed stream fit to learn from? What must be heard is heard, nothing is clipped, times fit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import SAMPLE_RATE


@dataclass(frozen=True)
class Limits:
    """snr_db: least, of an event that matters over all else while it is heard; answered events do, and
    all of a stream that ends in a question.  level_db: least, of such an event, dB full scale.
    clipped: largest share of samples at full scale.  overlap_s: longest that two answered events may sound
    together.  shortest_s: of such an event.
    """

    snr_db: float = 2.0
    level_db: float = -66.0
    clipped: float = 1e-4
    overlap_s: float = 0.5
    shortest_s: float = 0.05


def problems(pcm: np.ndarray, record: Mapping[str, Any], limits: Limits | None = None) -> list[str]:
    """What is wrong with a stream, float [S] and its record; nothing: it is suitable. Each problem begins
    with its kind: level, snr, overlap, duration, clipping.
    """
    limits = limits or Limits()
    found = []
    seconds = len(pcm) / SAMPLE_RATE
    if abs(seconds - record["duration_s"]) > 1e-3:
        found.append(f"duration: {seconds:.3f} s of sound, the record says {record['duration_s']:.3f} s")
    clipped = float(np.mean(np.abs(pcm) >= 1 - 2**-14))
    if not np.isfinite(pcm).all() or clipped > limits.clipped:
        found.append(f"clipping: {clipped:.2%} of the samples are at full scale")
    answered = [turn for turn in record["turns"] if turn["answer_s"] is not None]
    asked = any(turn["label"] == "question" for turn in record["turns"])
    for turn in record["turns"] if asked else answered:  # what is asked about must be heard, too
        found += _turn_problems(turn, seconds, limits)
    return found + _overlaps(answered, limits)


def _turn_problems(turn: Mapping[str, Any], seconds: float, limits: Limits) -> list[str]:
    name, found = f"{turn['label']} at {turn['start_s']:.2f} s", []
    if turn["end_s"] - turn["start_s"] < limits.shortest_s:
        found.append(f"duration: {name} lasts only {turn['end_s'] - turn['start_s']:.3f} s")
    if max(turn["end_s"], turn["answer_s"] or 0.0) > seconds + 1e-3:
        found.append(f"duration: {name} goes on to {turn['end_s']:.2f} s, behind the end")
    if turn.get("snr_db") is not None and turn["snr_db"] < limits.snr_db:
        found.append(f"snr: {name} is {turn['snr_db']:.1f} dB over all else, {limits.snr_db:g} dB are needed")
    if turn.get("level_db") is not None and turn["level_db"] < limits.level_db:
        found.append(f"level: {name} has {turn['level_db']:.1f} dB, {limits.level_db:g} dB are needed")
    return found


def _overlaps(answered: Sequence[Mapping[str, Any]], limits: Limits) -> list[str]:
    found = []
    ordered = sorted(answered, key=lambda turn: turn["start_s"])
    for before, after in itertools.pairwise(ordered):
        shared = min(before["end_s"], after["end_s"]) - after["start_s"]
        if shared > limits.overlap_s:
            found.append(f"overlap: {before['label']} and {after['label']} sound together for {shared:.2f} s")
    return found
