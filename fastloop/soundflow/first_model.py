"""The first model of the package: trained on synthetic sounds alone, to answer alarms, bells and beeps.

python -m fastloop.soundflow.first_model train --out DIR --minutes N [--seed 0] [--resume]
python -m fastloop.soundflow.first_model export --out DIR --to CHECKPOINT
python -m fastloop.soundflow.first_model eval [--model NAME|DIR] [--streams N] [--seed S]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ..checkpoint import load, save
from ..config import SAMPLE_RATE, DecoderConfig, EncoderConfig, ModelConfig
from ..text import Tokenizer
from .first_scores import SESSIONS, Outcome, listen, match, scores
from .pool import Batches, Pool
from .scenes import joined
from .train import PROBE, Losses, TrainConfig, Trainer, initial_weights, planned_steps
from .vocabulary import OTHER_PROMPTS, REPLIES, SYSTEM_PROMPT, token_ids, tokenizer

STATE = "state.safetensors"
CALIBRATION_STEPS = 20  # timed before the length of the schedule is fixed
SAVE_EVERY_S = 120.0
EVALUATION_SEED = 1_000_003  # scenes never trained on


def first_config(words: Tokenizer) -> ModelConfig:
    """1.2 M parameters in the architecture of the large model."""
    return ModelConfig(
        name="demo",
        encoder=EncoderConfig(layers=2, width=128, heads=2, ffn=384),
        decoder=DecoderConfig(
            layers=3,
            width=128,
            heads=4,
            kv_heads=2,
            head_width=32,
            ffn=384,
            vocab=words.vocab_size,
            vocab_padded=512,
            rope_base=1e4,
        ),
        tokens=token_ids(words),
        system_prompt=SYSTEM_PROMPT,
    )


def batches(config: ModelConfig, words: Tokenizer, pool: Pool) -> Batches:
    return Batches(config, words, pool, REPLIES, OTHER_PROMPTS)


def train(out: Path, minutes: float, steps: int, seed: int, resume: bool, workers: int, scenes: int) -> None:
    """Train for `steps` steps, or for as many as fit `minutes`; the state is saved every two minutes."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / STATE
    if state.exists() and not resume:
        raise SystemExit(f"{state} exists: give --resume to continue it, or another --out")
    words = tokenizer()
    config = first_config(words)
    with Pool(config, seed, scenes, workers=workers) as pool:
        drawn = batches(config, words, pool)
        if state.exists():
            steps = planned_steps(state)
        elif not steps:
            steps = _calibrate(config, drawn, seed, minutes)
        trainer = Trainer(config, TrainConfig(steps), initial_weights(config, seed, len(REPLIES)))
        if state.exists():
            trainer.load(state)
        _run(trainer, drawn, state)


def _calibrate(config: ModelConfig, drawn: Batches, seed: int, minutes: float) -> int:
    """How many steps fit the time: some steps of a model that is then thrown away."""
    trainer = Trainer(config, TrainConfig(10**6), initial_weights(config, seed, len(REPLIES)))
    trainer.advance(drawn[0])
    start = time.monotonic()
    for number in range(1, CALIBRATION_STEPS):
        trainer.advance(drawn[number])
    each = (time.monotonic() - start) / (CALIBRATION_STEPS - 1)
    steps = max(CALIBRATION_STEPS, int(minutes * 60 / each))
    print(f"{each:.2f} s a step: {steps} steps in {minutes:g} minutes", flush=True)
    return steps


def _run(trainer: Trainer, drawn: Batches, state: Path) -> None:
    start = saved = time.monotonic()
    first, steps = trainer.step, trainer.settings.steps
    while trainer.step < steps:
        losses = trainer.advance(drawn[trainer.step])
        now = time.monotonic()
        if trainer.step % 10 == 0:
            left = (now - start) / (trainer.step - first) * (steps - trainer.step)
            print(_line(trainer.step, steps, losses, left), flush=True)
        if now - saved > SAVE_EVERY_S or trainer.step == steps:
            trainer.save(state)
            saved = now


def _line(step: int, steps: int, losses: Losses, left_s: float) -> str:
    return (
        f"step {step}/{steps}  decision {losses.decision:.4f}  text {losses.text:.4f}  "
        f"probe {losses.probe:.4f}  right: silent {losses.silent_right:.3f} "
        f"respond {losses.respond_right:.3f}  {left_s / 60:.1f} minutes left"
    )


def export(out: Path, to: Path) -> None:
    """The weights of a training state as a checkpoint directory (it must not exist yet)."""
    words = tokenizer()
    config = first_config(words)
    state = out / STATE
    trainer = Trainer(config, TrainConfig(planned_steps(state)), initial_weights(config, 0, len(REPLIES)))
    trainer.load(state)
    weights = {name: value.detach() for name, value in trainer.weights.items() if name != PROBE}
    print(f"step {trainer.step}: wrote {save(to, config, weights, words.to_json())}")


def evaluate(name: str, streams: int, ambient: int, scenes_each: int, seed: int, window_s: float) -> None:
    """Print the scores of fresh streams with events, and the false triggers of fresh streams without any."""
    model = load(name)
    sets = (("streams with events", streams, 5, seed), ("streams without events", ambient, 0, seed + 1))
    for title, count, most_events, collection in sets:
        outcomes: list[Outcome] = []
        for first in range(0, count, SESSIONS):
            numbers = range(first, min(first + SESSIONS, count))
            made = [
                joined(collection, i * scenes_each, scenes_each, most_events=most_events) for i in numbers
            ]
            for part, answers in zip(made, listen(model, [m.pcm for m in made], window_s), strict=True):
                outcomes.append(match(part.events, answers, len(part.pcm) / SAMPLE_RATE))
        found = scores(outcomes, REPLIES)
        lines = (
            found.lines()
            if most_events
            else [f"{'hours':<24}{found.hours:.3f}", f"{'false_per_hour':<24}{found.false_per_hour:.1f}"]
        )
        print("\n  ".join([title, *lines]), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastloop.soundflow.first_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("train")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--minutes", type=float, default=25.0)
    run.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--resume", action="store_true")
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--workers", type=int, default=1, help="processes that generate sound")
    run.add_argument("--scenes", type=int, default=3000)
    write = commands.add_parser("export")
    write.add_argument("--out", type=Path, required=True)
    write.add_argument("--to", type=Path, required=True)
    score = commands.add_parser("eval")
    score.add_argument("--model", default="demo", help="a packaged model or a checkpoint directory")
    score.add_argument("--streams", type=int, default=24)
    score.add_argument("--ambient", type=int, default=24)
    score.add_argument("--scenes", type=int, default=7, help="scenes of 25.6 s in a stream")
    score.add_argument("--seed", type=int, default=EVALUATION_SEED)
    score.add_argument("--window", type=float, default=60.0, help="seconds of sound the model looks back on")
    score.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.command != "export":
        torch.set_num_threads(given.threads)
    if given.command == "train":
        train(given.out, given.minutes, given.steps, given.seed, given.resume, given.workers, given.scenes)
    elif given.command == "eval":
        evaluate(given.model, given.streams, given.ambient, given.scenes, given.seed, given.window)
    else:
        export(given.out, given.to)


if __name__ == "__main__":
    main()
