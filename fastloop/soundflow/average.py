"""The mean of models' weights: of runs that fell from the same weights it often does better than each.

    python -m fastloop.soundflow.average OUT MODEL [MODEL=SHARE ...] [--threshold P]

Each model is a packaged one or a directory; without shares all count alike. With one model it is that one,
with another threshold. Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint import CheckpointError, Model, load, save
from ..config import ConfigError


def average(models: Sequence[Model], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """sum of share x weight, in float64 and rounded once to the first model's dtype. CheckpointError where
    models differ in more than the values of their weights, ValueError where the shares do not sum to 1.
    """
    if abs(sum(shares) - 1.0) > 1e-6:
        raise ValueError(f"average: shares must sum to 1, got {', '.join(map(str, shares))}")
    first = models[0]
    for number, model in enumerate(models):
        told = f"average: model {number + 1}"
        if model.quantised:
            raise CheckpointError(f"{told} is quantised; average what it was made from")
        own = dataclasses.replace(model.config, threshold=first.config.threshold)
        if own != first.config or model.tokenizer.to_json() != first.tokenizer.to_json():
            raise CheckpointError(f"{told} has other dims or another tokenizer than model 1")
    return {
        name: sum(
            share * model.weights[name].double() for share, model in zip(shares, models, strict=True)
        ).to(first.dtype)  # type: ignore[union-attr]
        for name in first.weights
    }


def share_of(text: str) -> tuple[str, float | None]:
    """MODEL or MODEL=SHARE."""
    name, equals, share = text.rpartition("=")
    if not equals:
        return text, None
    try:
        return name, float(share)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: a share is a number, got {share!r}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the new model; must not exist")
    parser.add_argument("models", nargs="+", type=share_of, metavar="MODEL[=SHARE]")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="above which the new model answers; without: the first one's",
    )
    chosen = parser.parse_args(arguments)
    names, shares = zip(*chosen.models, strict=True)
    if None in shares and any(share is not None for share in shares):
        parser.error("either all models have a share or none has")
    try:
        models = [load(name) for name in names]
        equal = [1 / len(names)] * len(names)
        weights = average(models, equal if None in shares else shares)
        config = models[0].config
        if chosen.threshold is not None:
            config = dataclasses.replace(config, threshold=chosen.threshold)
        save(chosen.out, config, weights, models[0].tokenizer.to_json())
    except (CheckpointError, ConfigError, ValueError) as error:
        sys.exit(str(error))
    print(f"{chosen.out}: {len(models)} models")


if __name__ == "__main__":
    main()
