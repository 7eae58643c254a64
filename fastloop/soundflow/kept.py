"""Answers kept as they come: an evaluation that was cut off goes on where it was.

A file of JSON lines, one for each item, and beside it (.run.json) what they were made with: the model, what
is computed in, how it listens. A run that finds both goes on with what is missing; where they are of another
run it is refused, and a last line that was cut off is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Model
from .benchmark_files import BenchmarkError
from .hear import Answer, Hearing, hear
from .lock import alone
from .scorecard import plain

Line = Mapping[str, Any]
MARK_BYTES = 16  # of the hash that tells sounds apart


@contextlib.contextmanager
def kept(file: Path, run: Line) -> Iterator[Callable[[Line], None]]:
    """Open a file of answers -> what appends a line to it, to be called as answers come.

    run: what the answers depend on. BenchmarkError where `file` is of another run, where another process
    has it open, or where it cannot be written (what is in it is kept).
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as out:
            if not alone(out):
                raise BenchmarkError(f"{file}: another run is writing it; wait for it, or name another --out")
            _same_run(file, run)

            def add(line: Line) -> None:
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()

            yield add
    except OSError as error:
        raise BenchmarkError(f"{file}: cannot be written: {error}; what is in it is kept") from error


def read_lines(file: Path, texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """(place, line), each with the fields `texts`, which are strings. A last line that was cut off is
    dropped, from the file too; BenchmarkError names the line that is wrong.
    """
    if not file.exists():
        return []
    try:
        data = file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with file.open("r+b") as cut:
                cut.truncate(whole)
    except OSError as error:
        raise BenchmarkError(f"{file}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        where = f"{file}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise BenchmarkError(f"{where}: not valid JSON: {error}") from error
        for name in texts:
            if not isinstance(values, dict) or not isinstance(values.get(name), str):
                raise BenchmarkError(f"{where}: field {name!r} must be a string")
        found.append((where, values))
    return found


def run_of(model: Model, how: Hearing, idle: Sequence[str] = ()) -> dict[str, Any]:
    """What answers depend on: the model, and how it listens, without what is `idle`; sessions side by side
    do not change them.
    """
    options = {name: value for name, value in plain(how).items() if name not in ("sessions", *idle)}
    return {"fingerprint": model.fingerprint, "dtype": str(model.dtype), **options}


def _same_run(file: Path, run: Line) -> None:
    """Note what a new run is run with; BenchmarkError where `file` is of another one."""
    beside = file.with_suffix(".run.json")
    if not file.stat().st_size:
        part = beside.with_suffix(".part")
        try:
            part.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
            part.replace(beside)
        except OSError as error:
            raise BenchmarkError(f"{beside}: cannot be written: {error}") from error
        return
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{file}: of an unknown run: {beside} cannot be read: {error}") from error
    if before != run:
        raise BenchmarkError(
            f"{file}: of another run ({_difference(before, run)}); name another --out, or remove that file"
        )


def _difference(before: Any, now: Line) -> str:
    before = before if isinstance(before, dict) else {}
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


@dataclass(frozen=True)
class Heard:
    """Answers to each sound, in order, and the places of those that an earlier run had heard."""

    answers: list[list[Answer]]
    before: frozenset[int] = frozenset()


def hear_kept(
    model: Model,
    names: Sequence[str],
    sounds: Sequence[np.ndarray],
    how: Hearing,
    file: Path | None,
    progress: Callable[[int], None] = lambda done: None,
    **settings: str,
) -> Heard:
    """As `hear`, of sounds that have names; what `file` has is not heard again. None: nothing is kept.

    A line is {id: name, sound: hash of it, answers: [{t_s, text, emotion}]}. settings: what else the
    answers depend on. BenchmarkError where the file is of another run or a name of it has another sound.
    """
    if file is None:
        return Heard(hear(model, sounds, how, progress))
    marks = [_mark(pcm) for pcm in sounds]
    with kept(file, {**run_of(model, how), **settings}) as add:
        before = _before(file, names, marks)

        def keep(index: int, answers: list[Answer]) -> None:
            add({"id": names[index], "sound": marks[index], "answers": plain(answers)})

        return Heard(hear(model, sounds, how, progress, before, keep), frozenset(before))


def _mark(pcm: np.ndarray) -> str:
    return hashlib.blake2b(pcm.tobytes(), digest_size=MARK_BYTES).hexdigest()


def _before(file: Path, names: Sequence[str], marks: Sequence[str]) -> dict[int, list[Answer]]:
    """Which sounds `file` has answers to. Corpora may share names: those are told apart by their sound."""
    sounds: dict[str, set[str]] = defaultdict(set)
    for name, mark in zip(names, marks, strict=True):
        sounds[name].add(mark)
    found: dict[tuple[str, str], list[Answer]] = {}
    for where, line in read_lines(file, ("id", "sound")):
        name, mark = line["id"], line["sound"]
        if name in sounds and mark not in sounds[name]:
            raise BenchmarkError(
                f"{where}: {name!r} had another sound; name another --out, or remove that file"
            )
        found[name, mark] = _answers(line, where)
    keys = enumerate(zip(names, marks, strict=True))
    return {index: found[key] for index, key in keys if key in found}


def _answers(line: Line, where: str) -> list[Answer]:
    try:
        answers = [Answer(**values) for values in line["answers"]]
    except (KeyError, TypeError) as error:
        raise BenchmarkError(f"{where}: field 'answers' is not a list of answers: {error}") from error
    for answer in answers:
        if not (
            isinstance(answer.t_s, (int, float))
            and isinstance(answer.text, str)
            and isinstance(answer.emotion, (str, type(None)))
        ):
            raise BenchmarkError(f"{where}: field 'answers' holds {plain(answer)!r}, which is no answer")
    return answers
