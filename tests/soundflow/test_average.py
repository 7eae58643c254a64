"""python -m fastloop.soundflow.average: the mean of models' weights, and what cannot be averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastloop.checkpoint import Model, load, save
from fastloop.config import small
from fastloop.soundflow.average import main
from fastloop.testing.cases import random_model


def saved(path: Path, model: Model) -> Path:
    return save(path, model.config, model.weights, model.tokenizer.to_json())


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / f"m{seed}", random_model(small(layers=1), seed=seed)) for seed in (1, 2)]


@pytest.mark.parametrize(("shares", "own"), [(("", ""), 0.5), (("=0.25", "=0.75"), 0.25)])
def test_weights_are_means(pair: list[Path], shares: tuple[str, str], own: float, tmp_path: Path) -> None:
    main([str(tmp_path / "mean"), *(f"{path}{share}" for path, share in zip(pair, shares, strict=True))])
    a, b, mean = (load(path) for path in (*pair, tmp_path / "mean"))
    assert mean.dtype == a.dtype and mean.config == a.config
    for name, weight in mean.weights.items():
        wanted = own * a.weights[name].double() + (1 - own) * b.weights[name].double()
        assert torch.equal(weight, wanted.to(a.dtype)), name


def test_the_mean_of_one_is_itself(pair: list[Path], tmp_path: Path) -> None:
    main([str(tmp_path / "same"), str(pair[0])])
    same, own = load(tmp_path / "same"), load(pair[0])
    assert all(torch.equal(same.weights[name], own.weights[name]) for name in own.weights)


def test_the_threshold_is_the_first_one_s_or_as_wished(pair: list[Path], tmp_path: Path) -> None:
    first, other = tmp_path / "first", [str(path) for path in pair]
    main([str(first), other[0], "--threshold", "0.7"])
    main([str(tmp_path / "mean"), str(first), other[1]])
    main([str(tmp_path / "again"), str(tmp_path / "mean"), "--threshold", "0.4"])
    found = [load(tmp_path / name).config.threshold for name in ("first", "mean", "again")]
    assert found == [0.7, 0.7, 0.4]
    with pytest.raises(SystemExit, match="threshold: must be between 0 and 1, got 2"):
        main([str(tmp_path / "none"), str(first), "--threshold", "2"])


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        (("=0.5", "=0.6"), "shares must sum to 1, got 0.5, 0.6"),
        (("", "=0.5"), "2"),
        (("=half", "=0.5"), "2"),
    ],
)
def test_wrong_shares_are_refused(
    pair: list[Path], shares: tuple[str, str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "mean"), *(f"{path}{share}" for path, share in zip(pair, shares, strict=True))])
    assert told in str(stopped.value) and not (tmp_path / "mean").exists()


def test_other_dims_are_refused(pair: list[Path], tmp_path: Path) -> None:
    other = saved(tmp_path / "other", random_model(small(layers=2), seed=1))
    with pytest.raises(SystemExit, match="model 2 has other dims or another tokenizer than model 1"):
        main([str(tmp_path / "mean"), str(pair[0]), str(other)])
    with pytest.raises(SystemExit, match=r"m1: .*exists"):
        main([str(pair[0]), str(pair[1])])
