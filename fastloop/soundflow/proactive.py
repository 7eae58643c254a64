"""Proactive-Sound-Effect-Benchmark: should this sound be answered, and how? (github.com/masaz14)

The manifest has one JSON object a line: id, path (.../DOMAIN/FOLDER/DECISION/ID.wav), description, decision
(RESPOND | IGNORE). Every item is a stream of its own (tier "single"), or one of several in a stream, with
pauses between (tier "multi"): there a model must fall silent again, and what it says must come in time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..audio import AudioError
from ..checkpoint import Model
from ..config import SAMPLE_RATE
from .benchmark_files import BenchmarkError, Row, rows, samples, text
from .hear import Answer, Hearing
from .kept import hear_kept
from .statistics import Figure, share

RESPOND, IGNORE = "RESPOND", "IGNORE"
TIERS = ("single", "multi")
LEAD_S = 1.0  # silence before an item, so that the stream has begun
GRACE_S = 2.0  # silence after it, in which an answer still counts
TOGETHER = 4  # items in a stream of tier "multi"


@dataclass(frozen=True)
class Item:
    """One sound of the benchmark."""

    id: str
    path: str
    description: str
    decision: str

    @property
    def folder(self) -> str:
        return PurePosixPath(self.path).parts[-3]

    @property
    def domain(self) -> str:
        return PurePosixPath(self.path).parts[-4]


@dataclass(frozen=True)
class Verdict:
    """What the model made of an item."""

    item: Item
    reply: str | None

    @property
    def decision(self) -> str:
        return IGNORE if self.reply is None else RESPOND

    @property
    def right(self) -> bool:
        return self.decision == self.item.decision

    def prediction(self) -> dict[str, str]:
        """A line of predictions.jsonl, as the public evaluator reads it."""
        raw = f"<Decision>{self.decision}</Decision><Reply>{self.reply or ''}</Reply>"
        return {"id": self.item.id, "path": self.item.path, "reply": self.reply or "", "_raw_reply": raw}


def read_benchmark(manifest: Path) -> list[Item]:
    """The items of a manifest; BenchmarkError names the line and the field that is wrong."""
    items = [_item(row) for row in rows(manifest)]
    twice = {item.id for item in items if sum(other.id == item.id for other in items) > 1}
    if twice:
        raise BenchmarkError(f"{manifest}: id {sorted(twice)[0]!r} comes twice")
    return items


def _item(row: Row) -> Item:
    where = row[0]
    item = Item(*(text(row, name) for name in ("id", "path", "description", "decision")))
    if item.decision not in (RESPOND, IGNORE):
        raise BenchmarkError(f"{where}: field 'decision' is {item.decision!r}, not {RESPOND} or {IGNORE}")
    if len(PurePosixPath(item.path).parts) < 4:
        raise BenchmarkError(f"{where}: field 'path' is not .../DOMAIN/FOLDER/DECISION/ID.wav")
    return item


def read_sounds(items: Sequence[Item], audio: Path) -> tuple[list[np.ndarray], list[str]]:
    """The sound of each item, float32 [S] at 16 kHz, from files below `audio`, and a line for each that
    cannot be used (its sound is empty then). A path may begin with or without the folder `audio` itself.
    """
    sounds, problems = [], []
    for item in items:
        inside = PurePosixPath(item.path)
        shorter = PurePosixPath(*inside.parts[1:]) if inside.parts[0] == audio.name else inside
        place = next((audio / p for p in (inside, shorter) if (audio / p).is_file()), audio / inside)
        try:
            sounds.append(samples(place))
        except (AudioError, OSError) as error:
            problems.append(f"{item.id}: {error}")
            sounds.append(np.zeros(0, dtype=np.float32))
    return sounds, problems


def run_benchmark(
    model: Model,
    items: Sequence[Item],
    sounds: Sequence[np.ndarray],
    how: Hearing,
    tier: str = "single",
    progress: Callable[[int], None] = lambda done: None,
    file: Path | None = None,
) -> list[Verdict]:
    """Items and their sounds -> verdicts in the order of the items; `progress` gets streams done.

    file: answers are kept there as streams end, and a run that was cut off goes on (`hear_kept`).
    """
    together = 1 if tier == "single" else TOGETHER
    order = np.random.default_rng(0).permutation(len(items)) if together > 1 else np.arange(len(items))
    groups = [[int(i) for i in order[k : k + together]] for k in range(0, len(order), together)]
    joined = [_join([sounds[i] for i in group]) for group in groups]
    names = [" + ".join(items[i].id for i in group) for group in groups]
    answers = hear_kept(model, names, [pcm for pcm, _ in joined], how, file, progress, tier=tier).answers
    replies: dict[int, str | None] = {}
    for group, (_, spans), said in zip(groups, joined, answers, strict=True):
        for index, span in zip(group, spans, strict=True):
            replies[index] = _reply(said, *span)
    return [Verdict(item, replies[i]) for i, item in enumerate(items)]


def _join(sounds: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Sounds with silence before and after each -> one stream, and when an answer to each counts, s."""
    lead, grace = (np.zeros(round(s * SAMPLE_RATE), dtype=np.float32) for s in (LEAD_S, GRACE_S))
    parts, spans, at = [], [], 0.0
    for sound in sounds:
        parts += [lead, sound, grace]
        length = LEAD_S + len(sound) / SAMPLE_RATE + GRACE_S
        spans.append((at + LEAD_S, at + length))
        at += length
    return np.concatenate(parts), spans


def _reply(answers: Sequence[Answer], start_s: float, end_s: float) -> str | None:
    """All that was said in a time, or None."""
    said = [answer.text for answer in answers if start_s < answer.t_s <= end_s]
    return " ".join(said) if said else None


def table(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Figure]]:
    """Accuracy of the decision: overall, by true decision, by domain, by folder."""
    keys: dict[str, Callable[[Item], str]] = {
        "overall": lambda item: "all",
        "decision": lambda item: item.decision,
        "domain": lambda item: item.domain,
        "folder": lambda item: f"{item.domain} / {item.folder}",
    }
    found: dict[str, dict[str, Figure]] = {}
    for name, key in keys.items():
        counts: dict[str, list[bool]] = defaultdict(list)
        for verdict in verdicts:
            counts[key(verdict.item)].append(verdict.right)
        found[name] = {group: share(sum(rights), len(rights)) for group, rights in sorted(counts.items())}
    return found
