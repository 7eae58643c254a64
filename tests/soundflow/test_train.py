"""Whole runs of the trainer: it learns, resumes to the bit, stops cleanly, and says what is wrong."""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fastloop.checkpoint import load
from fastloop.cli import app
from fastloop.config import ConfigError
from fastloop.soundflow import ablation, sweep
from fastloop.soundflow.batches import Batches, BatchPlan, Drawn
from fastloop.soundflow.objective import Weighting
from fastloop.soundflow.report import read_log
from fastloop.soundflow.stage import NewModel, Stage, read_stage, stage_from, stage_names
from fastloop.soundflow.train import LOG, MODEL, PLOT, STATE, Trainer, TrainError
from fastloop.testing.streams import two_streams
from fastloop.testing.tolerance import relative_error

MODEL_DIMS = NewModel(
    name="tiny",
    encoder={"layers": 1, "width": 64, "heads": 1, "ffn": 64},
    decoder={
        "layers": 1,
        "width": 64,
        "heads": 1,
        "kv_heads": 1,
        "head_width": 64,
        "ffn": 64,
        "rope_base": 1e4,
    },
    system_prompt="Listen.",
    vocab=300,
)


def tiny(**changes: Any) -> Stage:
    values = {
        "name": "tiny", "steps": 6, "warmup": 2, "decay": 2, "peak_rate": 3e-3, "precision": "float32",
        "loss": Weighting(probe_weight=0.5, recalled_weight=0.5), "model": MODEL_DIMS,
        "batch": BatchPlan(chunks=12, rows_s=(4.8,)),
    }  # fmt: skip
    return Stage(**{**values, **changes})


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / STATE, weights_only=True)["model"]


def losses_of(run: Path) -> list[list[float]]:
    return [[v for k, v in row.items() if k != "seconds"] for row in read_log(run / LOG)]


def same(one: list[list[float]], other: list[list[float]]) -> bool:
    """Equal to the bit; NaN is equal to NaN."""
    return repr(one) == repr(other)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_streams(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def whole(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert Trainer(tiny(), [shard], out).run()
    return out


def test_a_run_leaves_a_model_that_loads_and_says_what_it_did(whole: Path) -> None:
    model = load(whole / MODEL)
    assert model.config.name == "tiny"
    assert model.dtype == torch.bfloat16
    state = weights_of(whole)["model.root.encoder.proj.weight"]
    assert torch.equal(model.weights["encoder.proj.weight"], state.bfloat16())
    assert len(read_log(whole / LOG)) == 6
    assert (whole / PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_computes_what_an_uninterrupted_one_does_to_the_bit(
    shard: Path, whole: Path, tmp_path: Path
) -> None:
    first = Trainer(tiny(), [shard], tmp_path)
    first.stage = dataclasses.replace(first.stage, steps=3, decay=0)  # the path is the same up to step 3
    assert first.run()
    resumed = Trainer(tiny(), [shard], tmp_path, resume=True)
    assert resumed.step == 3
    assert resumed.run()
    assert same(losses_of(tmp_path), losses_of(whole))
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(tmp_path)[name]), name


def test_batches_side_by_side_are_a_step_as_one_by_one_to_the_bit(shard: Path, tmp_path: Path) -> None:
    """Three batches a step, of which two threads compute two at once; and resumed in the middle."""
    stage, threads = tiny(accumulate=3, batch=BatchPlan(chunks=4, rows_s=(1.6, 4.8))), torch.get_num_threads()
    runs = {at_once: tmp_path / str(at_once) for at_once in (1, 2)}
    try:
        for at_once, out in runs.items():
            torch.set_num_threads(at_once)
            first = Trainer(stage, [shard], out)
            assert (first.beside.at_once if first.beside else 1) == at_once
            first.stage = dataclasses.replace(stage, steps=3, decay=0)
            assert first.run()
            first.close()
            assert Trainer(stage, [shard], out, resume=True).run()
            assert torch.get_num_threads() == at_once
    finally:
        torch.set_num_threads(threads)
    assert same(losses_of(runs[1]), losses_of(runs[2]))
    for name, value in weights_of(runs[1]).items():
        assert torch.equal(value, weights_of(runs[2])[name]), name


def test_batches_drawn_ahead_by_others_are_the_same(shard: Path, whole: Path, tmp_path: Path) -> None:
    """To the bit, from any step on, and nobody is left behind."""
    first = Trainer(tiny(), [shard], tmp_path, workers=2)
    first.stage = dataclasses.replace(first.stage, steps=3, decay=0)
    assert first.run()
    assert not multiprocessing.active_children()
    assert Trainer(tiny(), [shard], tmp_path, resume=True, workers=1).run()
    assert same(losses_of(tmp_path), losses_of(whole))
    assert not multiprocessing.active_children()


def test_an_error_of_a_batch_drawn_ahead_is_told_at_its_step(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Batches.draw

    def third(batches: Batches, number: int) -> Drawn:
        if number == 3:
            raise OSError("the disk is gone")
        return draw(batches, number)

    monkeypatch.setattr(Batches, "draw", third)
    trainer = Trainer(tiny(), [shard], tmp_path, workers=2)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.run()
    assert trainer.step == 3
    gc.collect()  # the traceback holds them
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stop_signal_saves_and_the_run_goes_on_from_there(
    shard: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    trainer = Trainer(tiny(), [shard], tmp_path, workers=workers)
    advance = trainer.advance

    def struck() -> list[float]:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of a step
        return advance()

    monkeypatch.setattr(trainer, "advance", struck)
    assert not trainer.run()
    assert trainer.step == 3
    assert Trainer(tiny(), [shard], tmp_path, resume=True).run()
    assert same(losses_of(tmp_path), losses_of(whole))


def test_a_run_does_not_go_on_with_other_streams(whole: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", two_streams(tmp_path / "other", seconds=6.1)
    shutil.copytree(whole, out)
    before = (out / STATE).read_bytes()
    with pytest.raises(TrainError, match="--data holds other streams"):
        Trainer(tiny(), [other], out, resume=True)
    assert (out / STATE).read_bytes() == before


@pytest.mark.parametrize(
    "name", [STATE, "stage.json", "model.json", "tokenizer.json", "classes.json", "data.json"]
)
@pytest.mark.parametrize("left", [0, 9])
def test_a_damaged_run_is_named_and_says_what_to_do(
    shard: Path, whole: Path, tmp_path: Path, name: str, left: int
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / name).write_bytes((out / name).read_bytes()[:left])
    with pytest.raises(TrainError, match=re.escape(f"{out / name}: missing or damaged") + ".*--from"):
        Trainer(tiny(), [shard], out, resume=True)
    assert load(out / MODEL).config.name == "tiny", "what was trained is still there"


def test_a_run_that_cannot_resume_leaves_no_directory(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to resume"):
        Trainer(tiny(), [shard], tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_run_learns(shard: Path, tmp_path: Path) -> None:
    stage = tiny(steps=40, batch=BatchPlan(chunks=24, rows_s=(4.0,)))
    assert Trainer(stage, [shard], tmp_path).run()
    rows = read_log(tmp_path / LOG)
    assert sum(row["total"] for row in rows[-5:]) < 0.5 * sum(row["total"] for row in rows[:5])


def test_only_the_named_weights_move(shard: Path, whole: Path, tmp_path: Path) -> None:
    stage = tiny(steps=2, trains=("encoder.proj.",), model=None)
    assert Trainer(stage, [shard], tmp_path, source=str(whole / MODEL)).run()
    before = load(whole / MODEL, dtype="float32").weights
    for name, value in weights_of(tmp_path).items():
        if name.startswith("model.root."):
            name = name.removeprefix("model.root.")
            moved = not torch.equal(value, before[name])
            assert moved == name.startswith("encoder.proj."), name


@pytest.mark.slow
def test_accumulation_in_one_process_is_fsdp2_in_two(shard: Path, tmp_path: Path) -> None:
    """Two gloo processes under torchrun see the batches that one process accumulates."""
    alone = tmp_path / "alone"
    assert Trainer(tiny(steps=2, accumulate=2), [shard], alone).run()
    stage = tmp_path / "tiny.yaml"
    stage.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(tiny(steps=2))))))
    root = Path(__file__).resolve().parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    train = ["-m", "fastloop", "train", str(stage), "--data", str(shard), "--out", str(tmp_path / "two")]
    for more in (["--steps", "1"], ["--resume"]):
        command = [*torchrun, *train, "--threads", "1", *more]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights_of(alone), weights_of(tmp_path / "two")
    assert set(one) == set(two)
    # AdamW's first steps are the sign of the gradient times the rate: where a gradient is near 0, its
    # rounding moves a weight by the rate.
    for name, value in one.items():
        assert relative_error(two[name], value) < 1e-3 or value.norm() < 0.1, name


# ---- what is wrong is said


def test_directories_are_not_overwritten_and_nothing_is_resumed_from_nowhere(
    shard: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match="--resume"):
        Trainer(tiny(), [shard], whole)
    with pytest.raises(TrainError, match="nothing to resume"):
        Trainer(tiny(), [shard], tmp_path, resume=True)
    with pytest.raises(TrainError, match="another stage"):
        Trainer(tiny(seed=1), [shard], whole, resume=True)
    with pytest.raises(TrainError, match="--from"):
        Trainer(tiny(model=None), [shard], tmp_path)
    with pytest.raises(ConfigError, match="no weight begins with middle"):
        Trainer(tiny(trains=("middle.",)), [shard], tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "Stage.steps"),
        ({"loss": {"text_weight": -1.0}}, "Weighting.text_weight"),
        ({"loss": {"control_weight": "1e-3"}}, "Weighting.control_weight"),
        ({"peak_rate": "1e-3"}, "1.0e-3"),
        ({"precision": "half"}, "bfloat16"),
        ({"trains": "decoder."}, "list of strings"),
        ({"lambda": 1}, "unknown keys"),
        ({"loss": {"text": 1}}, "loss"),
    ],
)
def test_a_wrong_field_of_a_stage_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stage_from({"name": "x", "steps": 1, **change}, "x.yaml")


def test_the_shipped_stages_are_valid_and_their_rates_rise_stay_and_fall() -> None:
    assert stage_names() == [
        "ablation",
        "adapter",
        "format",
        "instruct",
        "nano",
        "nano_gpu",
        "nano_second",
        "streaming",
    ]
    for name in stage_names():
        stage = read_stage(name)
        assert stage.name == name
        rates = [stage.rate(step) for step in range(stage.steps)]
        assert rates[0] < stage.peak_rate
        assert max(rates) == stage.peak_rate == rates[stage.warmup]
        assert 0 < rates[-1] < 0.01 * stage.peak_rate
        assert (stage.model is not None) == (name in ("nano", "nano_gpu", "ablation"))
    assert read_stage("ablation").model == read_stage("nano").model


def test_a_stage_says_how_it_differs_from_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "extends: nano\nname: more\nsteps: 25000\nmodel:\n  decoder: {layers: 6}\nlate: null\n"
    )
    (tmp_path / "most.yaml").write_text(
        "extends: more.yaml\nname: most\nbatch: {asks: 0.9}\nprompts: [Hello.]\n"
    )
    nano, most = read_stage("nano"), read_stage(str(tmp_path / "most.yaml"))
    assert nano.model is not None
    model = dataclasses.replace(nano.model, decoder=nano.model.decoder | {"layers": 6})
    batch = dataclasses.replace(nano.batch, asks=0.9)
    assert most == dataclasses.replace(
        nano, name="most", steps=25000, model=model, late=None, batch=batch, prompts=("Hello.",)
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: a.yaml", "a.yaml: extends itself"),
        ("extends: b.yaml", "a.yaml: extends itself, by way of .*a.yaml, .*b.yaml"),
        ("extends: ../{here}/a.yaml", "a.yaml: extends itself"),
        ("extends: [nano]", "a.yaml: extends: must be the name or the file"),
        ("extends: none", "stage 'none': cannot be read.*known stages: ablation"),
        ("extends: nano\nbatch: {chunk: 1}", "a.yaml.*batch"),
    ],
)
def test_what_is_wrong_with_an_extended_stage_is_said(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text.replace("{here}", tmp_path.name))
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ConfigError, match=words):
        read_stage(str(tmp_path / "a.yaml"))


def test_a_longer_stage_goes_on_from_a_shorter_one_until_the_rate_falls() -> None:
    short, long = tiny(steps=6), tiny(steps=60)
    assert long.same_path(short, 5)
    assert not long.same_path(short, 6)  # the short one's last step had begun to fall
    assert not tiny(peak_rate=1e-3).same_path(short, 1)


def test_what_is_drawn_late_may_change_until_it_is_drawn() -> None:
    late, other = BatchPlan(chunks=24), BatchPlan(chunks=48)
    stage = tiny(steps=10, decay=4, late=late)  # the last four steps
    assert tiny(steps=10, decay=4, late=other).same_path(stage, 6)
    assert not tiny(steps=10, decay=4, late=other).same_path(stage, 7)
    assert tiny(steps=20, decay=4, late=late).same_path(stage, 6)
    assert not tiny(steps=20, decay=4, late=late).same_path(stage, 7)
    assert stage.same_path(stage, 9)


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    for arguments, words in (
        (["nano", "--data", str(tmp_path), "--out", str(tmp_path / "o")], "no *.tar"),
        (["none", "--data", str(tmp_path), "--out", str(tmp_path / "o")], "known stages"),
        (["nano", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--threads", "-1"], "--threads"),
        (
            ["nano", "--data", str(tmp_path), "--out", str(tmp_path / "o"), "--threads", "9999"],
            "or 0 for all",
        ),
    ):
        done = CliRunner().invoke(app, ["train", *arguments])
        assert done.exit_code == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_sweep_trains_each_value_and_puts_them_into_one_table(tmp_path: Path) -> None:
    shards = [two_streams(tmp_path / split, split) for split in ("train", "val")]
    stage = tmp_path / "tiny.yaml"
    stage.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(tiny())))))
    arguments = [
        str(stage),
        "--vary",
        "loss.control_weight=0.5,2",
        "--data",
        str(shards[0]),
        "--val",
        str(shards[1]),
    ]
    sweep.main([*arguments, "--steps", "3", "--out", str(tmp_path / "o")])
    rows = (tmp_path / "o" / "sweep.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["loss.control_weight", "---", "0.5", "2"]
    weights = [
        json.loads((tmp_path / "o" / v / "stage.json").read_text())["loss"]["control_weight"]
        for v in ("0.5", "2")
    ]
    assert weights == [0.5, 2]
    with pytest.raises(ConfigError, match="unknown; known are"):
        sweep.changed(tiny(), {"loss.lambda": 1}, 3)


def test_an_ablation_builds_trains_and_scores_every_row_once(manifest: Path, tmp_path: Path) -> None:
    stage = tmp_path / "tiny.yaml"
    stage.write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(tiny())))))
    out = tmp_path / "o"
    arguments = ["--clips", str(manifest), "--out", str(out), "--stage", str(stage), "--steps", "2"]
    arguments += ["--hours", "0.03", "--val-hours", "0.01", "--tasks", "sound_alert", "--workers", "0"]
    ablation.main([*arguments, "--jobs", "2"])
    lines = (out / "ablation.md").read_text().splitlines()
    told = [line.split("|")[1].strip().rpartition(", above ") for line in lines[2:]]
    assert [name for name, _, _ in told] == list(ablation.rows(tiny()))
    assert all(float(threshold) in ablation.THRESHOLDS for _, _, threshold in told)
    chunks = {
        name: json.loads((out / "runs" / name / "stage.json").read_text())["batch"]["chunks"]
        for name in ("as_shipped", "chunks_of_0.2_s", "chunks_of_0.8_s")
    }
    assert chunks == {"as_shipped": 12, "chunks_of_0.2_s": 24, "chunks_of_0.8_s": 6}
    notes = {name: json.loads((out / name / "train.build.json").read_text()) for name in ablation.CORPORA}
    assert not notes["without_tfjp"]["tfjp"] and notes["without_selection"]["planner"] == "random"
    states = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/state.ckpt")}
    before = (out / "ablation.md").read_text()
    ablation.main(arguments)
    assert (out / "ablation.md").read_text() == before
    assert states == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/state.ckpt")}
