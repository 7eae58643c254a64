"""Foreign checkpoints that are hostile or damaged: nothing is executed, no file outside is read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

PICKLE = "audiointeraction_ChunkwisedEncoder.pth"
INDEX = "model.safetensors.index.json"
Refused = Callable[..., str]


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    values = json.loads((directory / INDEX).read_text())
    change(values["weight_map"])
    (directory / INDEX).write_text(json.dumps(values))


# ---- the pickle


class Bomb:
    """What a hostile pickle holds: a call that runs while it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


def test_a_pickle_is_not_opened_unless_it_is_trusted(
    refused: Refused, published: Path, tmp_path: Path
) -> None:
    sentinel = tmp_path / "executed"
    torch.save({"x": Bomb(sentinel)}, published / PICKLE)
    message = refused(published, trust_pickle=False)
    assert PICKLE in message and "--trust-pickle" in message and "can run code" in message
    assert not sentinel.exists()


@pytest.mark.parametrize("form", ["torch", "legacy", "plain"])
def test_code_in_a_trusted_pickle_is_never_run(
    refused: Refused, published: Path, tmp_path: Path, form: str
) -> None:
    sentinel = tmp_path / "executed"
    state = {**torch.load(published / PICKLE, weights_only=True), "x": Bomb(sentinel)}
    if form == "plain":
        (published / PICKLE).write_bytes(pickle.dumps({"x": Bomb(sentinel)}))
    else:
        torch.save(state, published / PICKLE, _use_new_zipfile_serialization=form == "torch")
    message = refused(published)
    assert PICKLE in message and "weights-only" in message
    assert not sentinel.exists()
    if form == "torch":  # the bomb is live: an unguarded loader sets it off
        torch.load(published / PICKLE, weights_only=False)
        assert sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": {"conv1.bias": torch.zeros(1)}}, {"a": 1}, {1: torch.zeros(1)}, torch.zeros(3)],
)
def test_a_pickle_of_something_else(refused: Refused, published: Path, content: object) -> None:
    torch.save(content, published / PICKLE)
    assert "flat dictionary" in refused(published)


def test_a_pickle_that_is_damaged_or_missing(refused: Refused, published: Path) -> None:
    whole = (published / PICKLE).read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a pickle" * 100):
        (published / PICKLE).write_bytes(content)
        assert PICKLE in refused(published)
    (published / PICKLE).unlink()
    assert "no such file" in refused(published)


# ---- the index and the shards


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "sub/x.safetensors", "..", "", "a\\b", "a\0b", "{outside}"]
)
def test_an_index_cannot_lead_out_of_its_directory(
    refused: Refused, published: Path, tmp_path: Path, shard: str
) -> None:
    """Also where the file that it names is there and right."""
    outside = tmp_path / "outside.safetensors"
    first = min(published.glob("*.safetensors"))
    outside.write_bytes(first.read_bytes())
    (published / "sub").mkdir()
    (published / "sub" / "x.safetensors").write_bytes(first.read_bytes())
    named = shard.format(outside=outside)
    edit_index(published, lambda home: home.update({n: named for n in home if home[n] == first.name}))
    assert "is not a file name in this directory" in refused(published)


def test_a_shard_that_is_missing(refused: Refused, published: Path) -> None:
    min(published.glob("*.safetensors")).unlink()
    assert "model-00001-of-00002.safetensors' is missing; download it again" in refused(published)


def test_index_and_shards_must_agree(refused: Refused, published: Path) -> None:
    name = "transformer.wte.weight"
    edit_index(published, lambda home: home.update(ghost=home[name]))
    assert "'ghost' is not in" in refused(published)
    edit_index(published, lambda home: (home.pop("ghost"), home.pop(name)))
    assert f"'{name}' is not named by the index but is in" in refused(published)


def test_a_tensor_in_two_shards(refused: Refused, published: Path) -> None:
    """Which one counts would be a guess."""
    first, second = sorted(published.glob("*.safetensors"))
    weights = safetensors.torch.load_file(second)
    name = next(iter(safetensors.torch.load_file(first)))
    safetensors.torch.save_file({**weights, name: torch.zeros(1)}, second)
    assert f"'{name}' is not named by the index but is in" in refused(published)


def test_a_name_twice_in_the_index(refused: Refused, published: Path) -> None:
    text = (published / INDEX).read_text()
    (published / INDEX).write_text(
        text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x", ', 1)
    )
    assert "'lm_head.weight' twice" in refused(published)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{" * 9999]
)
def test_an_index_that_is_none(refused: Refused, published: Path, content: str) -> None:
    (published / INDEX).write_text(content)
    assert INDEX in refused(published)


def test_a_shard_that_shrinks_while_it_is_read(refused: Refused, published: Path) -> None:
    shard = max(published.glob("*.safetensors"), key=lambda path: path.stat().st_size)

    def shrink(done: int, total: int) -> None:
        os.truncate(shard, 5_000)

    assert "became shorter" in refused(published, progress=shrink)


# ---- the config


def test_yaml_that_would_run_code_or_fill_memory(refused: Refused, published: Path, tmp_path: Path) -> None:
    path, sentinel = published / "model_config.yaml", tmp_path / "executed"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{sentinel}']\n")
    assert "not valid YAML" in refused(published) and not sentinel.exists()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]  # 9^12 of them
    path.write_text("\n".join(lines) + "\n")
    assert "unknown fields" in refused(published)
    path.write_text("#" * (2 << 20))
    assert "at most 1048576 are plausible" in refused(published)
