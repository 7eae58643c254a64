"""A tiny model of random weights as a checkpoint, sounds to hear, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from typer.testing import CliRunner, Result

from fastloop.checkpoint import Model, load, save
from fastloop.cli import app
from fastloop.config import small
from fastloop.testing.cases import random_model, random_sound

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(small(layers=1), seed=3)
    directory = tmp_path_factory.mktemp("models") / "random"
    return save(directory, model.config, model.weights, model.tokenizer.to_json())


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Model:
    return load(model_dir)


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound "whole" has 12 chunks to the sample, "part" has 3.3."""
    directory = tmp_path_factory.mktemp("sounds")
    files = {"whole": directory / "whole.wav", "part": directory / "part.flac"}
    soundfile.write(files["whole"], random_sound(4.8, seed=1), 16_000, subtype="FLOAT")
    soundfile.write(files["part"], random_sound(1.32, seed=2), 16_000, subtype="PCM_16")
    return files


@pytest.fixture
def run() -> Run:
    """`fastloop ...` in this process: exit code, standard output and standard error apart."""

    def invoke(*arguments: object, input: bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input, catch_exceptions=False)

    return invoke
