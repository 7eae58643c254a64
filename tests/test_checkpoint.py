"""Our checkpoint format: round trips, mapped loading, whole-or-nothing saving."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastloop import checkpoint
from fastloop.checkpoint import CheckpointError, Model, load, save
from fastloop.config import ModelConfig, small
from fastloop.testing.cases import byte_tokenizer, random_model

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(small(layers=1), seed=5)


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    return save(tmp_path / "saved", model.config, model.weights, model.tokenizer.to_json())


def write_weights(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """By the format's own library, which shares no code with ours."""
    safetensors.torch.save_file(weights, directory / WEIGHTS)


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(small(layers=2), seed=1, dtype=dtype)
    directory = save(tmp_path / "a" / "b", model.config, model.weights, model.tokenizer.to_json())
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG, WEIGHTS, TOKENIZER]
    assert [path.name for path in directory.parent.iterdir()] == ["b"]
    again, other = load(directory), safetensors.torch.load_file(directory / WEIGHTS)
    assert again.config == model.config
    assert again.tokenizer.to_json() == model.tokenizer.to_json()
    assert list(again.weights) == list(model.weights) and set(other) == set(model.weights)
    for name, tensor in model.weights.items():
        assert torch.equal(again.weights[name], tensor) and torch.equal(other[name], tensor)
    assert again.fingerprint == model.fingerprint
    assert (again.dtype, again.device) == (dtype, torch.device("cpu"))
    assert again.weight_bytes == sum(t.numel() for t in other.values()) * dtype.itemsize


def test_tied_head_has_no_rows_of_its_own(tmp_path: Path) -> None:
    values = json.loads(small().to_json())
    values["decoder"]["tied"] = True
    model = random_model(ModelConfig.from_json(json.dumps(values)))
    again = load(save(tmp_path / "tied", model.config, model.weights, model.tokenizer.to_json()))
    assert "decoder.head.weight" not in again.weights
    assert again.decoder.head is again.weights["decoder.embed.weight"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, torch.float32])
def test_load_in_another_dtype(saved: Path, model: Model, dtype: Any) -> None:
    loaded = load(saved, dtype=dtype)
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, tensor in model.weights.items():
        assert torch.equal(loaded.weights[name], tensor.to(target))
    assert (loaded.fingerprint == model.fingerprint) == (target == torch.float32)


def test_load_refuses_a_dtype_that_overflows(saved: Path, model: Model) -> None:
    big = dict(model.weights) | {
        "encoder.proj.bias": torch.full_like(model.weights["encoder.proj.bias"], 1e5)
    }
    write_weights(saved, big)
    with pytest.raises(CheckpointError, match=r"encoder\.proj\.bias.*not finite in torch.float16"):
        load(saved, dtype="float16")


def test_load_refuses_a_dtype_that_is_none(saved: Path) -> None:
    for dtype in ("int8", "double", torch.int32, torch.float64):
        with pytest.raises(CheckpointError, match="float32, bfloat16, float16"):
            load(saved, dtype=dtype)


def test_fingerprint_tells_checkpoints_apart(model: Model) -> None:
    prints = {model.fingerprint}
    for name, tensor in model.weights.items():  # any tensor counts
        changed = dict(model.weights) | {name: tensor + 1}
        prints.add(Model(model.config, changed, model.tokenizer).fingerprint)
    values = json.loads(model.config.to_json()) | {"system_prompt": "another"}
    other = ModelConfig.from_json(json.dumps(values))
    prints.add(Model(other, model.weights, model.tokenizer).fingerprint)
    answers_later = dataclasses.replace(model.config, threshold=0.9)
    assert Model(answers_later, model.weights, model.tokenizer).fingerprint == model.fingerprint
    assert len(prints) == 2 + len(model.weights)


# ---- memory


def test_weights_are_views_of_the_file(saved: Path) -> None:
    loaded = load(saved)
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(saved / WEIGHTS))
    ]
    for tensor in loaded.weights.values():
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(start <= first and last <= end for start, end in ranges)


def test_writing_to_a_weight_leaves_the_file_alone(saved: Path) -> None:
    before = (saved / WEIGHTS).read_bytes()
    loaded = load(saved)
    for tensor in loaded.weights.values():
        tensor.zero_()
    assert (saved / WEIGHTS).read_bytes() == before


MEASURE = """
import re, sys, torch
from fastloop.checkpoint import load

def resident(field):  # of this program alone; getrusage's maximum begins with the parent's
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def use(path):
    model = load(path, dtype=sys.argv[3])
    for tensor in model.weights.values():
        assert tensor.sum().isfinite()  # touches every page
    return model.weight_bytes

torch.set_num_threads(1)
use(sys.argv[1])  # a small one first: the program's own pages come in
before = resident("VmRSS")
size = use(sys.argv[2])
print((resident("VmHWM") - before) / size)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB of random weights, the embedding and the head 80 MB each."""
    values = json.loads(small(vocab=20_000).to_json())
    values["decoder"] |= {"width": 1024, "ffn": 1536, "layers": 4}
    config = ModelConfig.from_json(json.dumps(values))
    weights = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for name, shape in checkpoint.weight_shapes(config).items()
    }
    assert sum(tensor.nbytes for tensor in weights.values()) > 200e6
    path = tmp_path_factory.mktemp("large") / "model"
    return save(path, config, weights, byte_tokenizer(512).to_json())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_weights(saved: Path, large: Path, dtype: str) -> None:
    """Peak resident memory while loading and after using every weight: at most 1.1 x the weights."""
    command = [sys.executable, "-c", MEASURE, str(saved), str(large), dtype]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio <= 1.1


# ---- saving: whole or not at all


def test_save_refuses_an_existing_directory(saved: Path, model: Model) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        save(saved, model.config, model.weights, model.tokenizer.to_json())
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    with pytest.raises(CheckpointError, match="exists already"):
        save(saved / WEIGHTS, model.config, model.weights, model.tokenizer.to_json())


def test_save_fills_an_empty_directory(tmp_path: Path, model: Model) -> None:
    (tmp_path / "empty").mkdir()
    load(save(tmp_path / "empty", model.config, model.weights, model.tokenizer.to_json()))


class Failing(dict[str, torch.Tensor]):
    """Weights whose nineteenth tensor cannot be had."""

    def __init__(self, weights: Any, fail: Callable[[], object]) -> None:
        super().__init__(weights)
        self.fail, self.left = fail, 18

    def __getitem__(self, name: str) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            self.fail()
        return super().__getitem__(name)


def test_save_interrupted_leaves_nothing(model: Model, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "x", model.config, Failing(model.weights, interrupt), model.tokenizer.to_json())
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import Failing
from fastloop.checkpoint import save
from fastloop.config import small
from fastloop.testing.cases import random_model
model = random_model(small(layers=1))
weights = Failing(model.weights, lambda: os.kill(os.getpid(), signal.SIGKILL))
save(sys.argv[2], model.config, weights, model.tokenizer.to_json())
"""


def test_save_killed_leaves_no_half_checkpoint(model: Model, tmp_path: Path) -> None:
    target = tmp_path / "x"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(target)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()  # the hidden, unfinished directory, which no name leads to
    assert left.name.startswith(".x.") and (left / WEIGHTS).stat().st_size > 0
    with pytest.raises(CheckpointError, match=f"no {CONFIG}"):
        load(left)
    save(target, model.config, model.weights, model.tokenizer.to_json())
    assert load(target).fingerprint == model.fingerprint


def test_save_on_a_full_disk_leaves_nothing(model: Model, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(CheckpointError, match="not written, and nothing is left of it"):
            save(tmp_path / "x", model.config, model.weights, model.tokenizer.to_json())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_save_asks_for_the_space_first(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": model.weight_bytes})  # the tokenizer does not fit
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=rf"needs \d+ bytes, {model.weight_bytes} are free"):
        save(tmp_path / "x", model.config, model.weights, model.tokenizer.to_json())
    assert list(tmp_path.iterdir()) == []


def test_save_names_all_that_is_wrong(model: Model, tmp_path: Path) -> None:
    weights = dict(model.weights)
    del weights["encoder.conv1.bias"]
    weights["encoder.new"] = torch.zeros(1)
    weights["decoder.norm.weight"] = torch.zeros(3)
    weights["encoder.norm.bias"] = weights["encoder.norm.bias"].half()
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "x", model.config, weights, byte_tokenizer(513).to_json())
    message = str(error.value)
    for part in (
        "missing (1): encoder.conv1.bias",
        "left over (1): 'encoder.new'",
        "wrong shape (1): decoder.norm.weight is [3], must be [64]",
        "encoder.norm.bias is torch.float16",
        "largest id is 512, the model's vocabulary is 512",
    ):
        assert part in message
    assert list(tmp_path.iterdir()) == []
