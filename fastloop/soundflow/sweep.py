"""One stage, trained several times with one field changed, and what each model scores.

    python -m fastloop.soundflow.sweep nano --vary loss.control_weight=0.5,1,2 --data corpus --val corpus \\
        --steps 600 --out runs/lambda
    ... --vary model.chunk_frames=20,40,80 ...
    ... --vary data=corpus,corpus-without-tfjp ...

Every value is trained from the same seed (or from the same checkpoint, --from) for the same number of
steps, and scored on the same streams. `sweep.json` and `sweep.md` in --out hold the table; a value whose run
is complete is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..checkpoint import Model, load
from ..config import ConfigError
from .evaluate import Scores, match, score
from .hear import Hearing, hear
from .scorecard import write_json
from .shards import find_shards
from .stage import Stage, read_stage, stage_from
from .train import MODEL, STATE, Trainer
from .truth import Pair, read_truth

SHOWN = ("f1", "sound_f1", "digits_f1", "word_error_rate", "false_triggers_per_hour", "silent_clips_right")


def changed(stage: Stage, changes: Mapping[str, Any], steps: int) -> Stage:
    """The stage with every `a.b` at its new value, `steps` long, the last third at a falling rate."""
    values = dataclasses.asdict(stage) | {"steps": steps, "decay": steps // 3, "warmup": min(100, steps // 6)}
    for name, value in changes.items():
        *path, leaf = name.split(".")
        place = values
        for part in path:
            if not isinstance(place.get(part), dict):
                raise ConfigError(f"{name}: stage {stage.name!r} has no {part}")
            place = place[part]
        if leaf not in place:
            raise ConfigError(f"{name}: unknown; known are {', '.join(sorted(place))}")
        place[leaf] = value
    return stage_from(values, ", ".join(f"{name}={value}" for name, value in changes.items()) or stage.name)


def trained(stage: Stage, data: Sequence[Path], out: Path, source: str | None) -> Model:
    """Train (or go on, or leave as it is, where it is complete); the last model, in float32."""
    resume = (out / STATE).exists()
    with contextlib.closing(Trainer(stage, find_shards(data), out, source=source, resume=resume)) as trainer:
        if trainer.step < stage.steps and not trainer.run():
            raise SystemExit(130)
    return load(out / MODEL, dtype="float32")


def scored(model: Model, val: Sequence[Pair], threshold: float | None = None) -> Scores:
    """What it scores where it responds above `threshold`; None: its own."""
    answers = hear(model, [pcm for _, pcm in val], Hearing(threshold=threshold))
    return score([match(stream, said) for (stream, _), said in zip(val, answers, strict=True)])


def table(field: str, found: dict[str, Scores]) -> str:
    """Markdown: a row a value."""
    head = [field, *(name.replace("_", " ") for name in SHOWN)]
    rows = [head, ["---"] * len(head)]
    rows += [[value, *(str(s.figures[name]) for name in SHOWN)] for value, s in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastloop.soundflow.sweep", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--vary", required=True, help="FIELD=VALUE,VALUE,... or data=DIR,DIR,...")
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--val", type=Path, action="append", required=True)
    parser.add_argument("--streams", type=int, default=0, help="of --val; 0: all")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="source")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    field, _, values = given.vary.partition("=")
    stage, val = read_stage(given.stage), read_truth(given.val, "val", print, given.streams)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Scores] = {}
    for text in values.split(","):
        data = [Path(text)] if field == "data" else given.data
        one = changed(stage, {} if field == "data" else {field: yaml.safe_load(text)}, given.steps)
        model = trained(one, data, given.out / text.replace("/", "_"), given.source)
        found[text] = scored(model, val)
        write_json(given.out / "sweep.json", {"vary": field, "steps": given.steps, "values": found})
        (given.out / "sweep.md").write_text(table(field, found), encoding="utf-8")
    print(table(field, found))


if __name__ == "__main__":
    main()
