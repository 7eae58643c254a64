"""Foreign checkpoints -> ours, one tensor at a time: the published layout, and Hugging Face Qwen2.5-Omni.

What is done to the weights: q, k and v are joined to row blocks [Q | K | V] (the encoder's missing k bias
is zero), gate and up to [gate; up], and everything gets one dtype. Both formats get the published
protocol's token ids and system prompt; a base Qwen2.5-Omni has the vocabulary for them, not the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint import WEIGHT_DTYPES, listed, parse_tokenizer, read_tokenizer, refuse, weight_shapes
from ..config import PUBLISHED_SYSTEM_PROMPT, PUBLISHED_TOKENS, ConfigError, ModelConfig
from ..files import CheckpointError, quote
from ..tensorfile import require_finite
from . import published, thinker
from .recipes import Recipe, Recipes, encoder_recipes, published_recipes, thinker_recipes
from .sources import Lazy, pickled_file, safetensors_directory

__all__ = ["Report", "convert"]

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
READABLE = (*WEIGHT_DTYPES.values(), torch.float64)


@dataclass(frozen=True)
class Report:
    """What `convert` did."""

    source_format: str  # "published" or "hugging-face"
    destination: Path
    config: ModelConfig
    dtype: torch.dtype
    tensors: int
    weight_bytes: int
    cast: dict[str, int]  # source tensors that had another dtype: dtype -> how many
    unused: tuple[str, ...]  # source tensors left out on purpose


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint, read up to its headers."""

    source_format: str
    config: ModelConfig
    tensors: dict[str, Lazy]
    recipes: Recipes
    unused: tuple[str, ...]
    tokenizer_json: str


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    trust_pickle: bool = False,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a foreign checkpoint directory into a new directory that `checkpoint.load` reads.

    Args:
        trust_pickle: the published layout keeps its encoder in a pickle; read it only if this is True.
        dtype: float32, bfloat16 or float16; None keeps the dtype of the decoder's embedding.
        progress: called after every tensor with (bytes written, bytes in all).

    CheckpointError names everything that is missing, left over, mis-shaped or unsupported; the
    destination then does not exist. Memory: the largest of our tensors and its parts.
    """
    source, destination = Path(source), Path(destination).absolute()
    foreign = _open(source, destination.name, trust_pickle)
    refuse(str(source), _problems(foreign))
    if dtype is None:
        (embedding,) = foreign.recipes["decoder.embed.weight"].parts
        dtype = foreign.tensors[embedding].dtype
    target = checkpoint.as_dtype(dtype)
    shapes = weight_shapes(foreign.config)
    total = sum(math.prod(shape) for shape in shapes.values()) * target.itemsize
    written = _built(foreign, target, total, progress)
    checkpoint.write_checkpoint(destination, foreign.config, target, written, foreign.tokenizer_json)
    cast: dict[str, int] = {}
    for recipe in foreign.recipes.values():
        for part in recipe.parts:
            if (have := foreign.tensors[part].dtype) != target:
                cast[str(have)] = cast.get(str(have), 0) + 1
    return Report(
        foreign.source_format, destination, foreign.config, target, len(shapes), total, cast, foreign.unused
    )


def _open(source: Path, name: str, trust_pickle: bool) -> Foreign:
    """Find out the format and read everything but the tensors' data."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: {'is not a directory' if source.exists() else 'does not exist'}")
    try:
        if (source / published.CONFIG).is_file():
            return _open_published(source, name, trust_pickle)
        if (source / thinker.CONFIG).is_file():
            return _open_thinker(source, name)
    except ConfigError as error:  # sizes that do not fit together, or an id outside the vocabulary
        raise CheckpointError(f"{source}: {error}") from error
    raise CheckpointError(
        f"{source}: neither {published.CONFIG} (the published layout) nor {thinker.CONFIG} "
        "(a Hugging Face Qwen2.5-Omni directory)"
    )


def _open_published(source: Path, name: str, trust_pickle: bool) -> Foreign:
    fields = published.read_fields(source)
    tokenizer_json, vocab = _tokenizer(source)
    decoder = published.decoder_config(fields, vocab)
    audio, *_ = thinker.read_config(source / published.ENCODER_CONFIG)
    encoder = thinker.encoder_config(audio, str(source / published.ENCODER_CONFIG), decoder.width)
    config = ModelConfig(name, encoder, decoder, PUBLISHED_TOKENS, PUBLISHED_SYSTEM_PROMPT)
    language = safetensors_directory(source)
    tower = pickled_file(source / published.ENCODER_WEIGHTS, trust_pickle)
    prefix = f"{published.ENCODER_WEIGHTS}:"  # keeps the names of the two files apart
    tensors = language | {prefix + key: tensor for key, tensor in tower.items()}
    recipes = encoder_recipes(config, prefix) | published_recipes(config, language)
    unused = tuple(key for key in tensors if key == prefix + published.ENCODER_UNUSED)
    return Foreign("published", config, tensors, recipes, unused, tokenizer_json)


def _open_thinker(source: Path, name: str) -> Foreign:
    where = str(source / thinker.CONFIG)
    audio, text, untied = thinker.read_config(source / thinker.CONFIG)
    tokenizer_json, vocab = _tokenizer(source)
    tensors = safetensors_directory(source)
    prefix = thinker.prefix_of(tensors, source)
    tied = f"{prefix}lm_head.weight" not in tensors and not untied
    decoder = thinker.decoder_config(text, where, vocab, tied)
    encoder = thinker.encoder_config(audio, where, decoder.width)
    config = ModelConfig(name, encoder, decoder, PUBLISHED_TOKENS, PUBLISHED_SYSTEM_PROMPT)
    recipes = encoder_recipes(config, f"{prefix}audio_tower.") | thinker_recipes(config, prefix)
    unused = tuple(key for key in tensors if thinker.is_unused(key, prefix))
    return Foreign("hugging-face", config, tensors, recipes, unused, tokenizer_json)


def _tokenizer(source: Path) -> tuple[str, int]:
    """The text of `tokenizer.json`, and one more than its largest id."""
    path = source / checkpoint.TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; a directory with vocab.json and merges.txt alone gets one from "
            "transformers' AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    text = read_tokenizer(path)
    return text, parse_tokenizer(text, str(path)).vocab_size


def _problems(foreign: Foreign) -> list[str]:
    """Everything that is wrong with the source tensors, a line each kind."""
    wanted = {name: shape for recipe in foreign.recipes.values() for name, shape in recipe.parts.items()}
    found = {name: foreign.tensors[name] for name in wanted if name in foreign.tensors}
    left_over = [quote(name) for name in foreign.tensors if name not in wanted and name not in foreign.unused]
    shapes = [
        f"{name} is {list(tensor.shape)}, must be {list(wanted[name])}"
        for name, tensor in found.items()
        if tuple(tensor.shape) != tuple(wanted[name])
    ]
    dtypes = [f"{name} is {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in READABLE]
    return [
        *listed("missing", [name for name in wanted if name not in found]),
        *listed("left over", left_over),
        *listed("wrong shape", shapes),
        *listed("wrong dtype, must be floating point", dtypes),
    ]


def _built(foreign: Foreign, dtype: torch.dtype, total: int, progress: Progress | None) -> Iterator[Tensor]:
    """Our tensors in the order of `weight_shapes`, each read, cast and joined when it is asked for."""
    done = 0
    for name in weight_shapes(foreign.config):
        tensor = _build(name, foreign.recipes[name], foreign.tensors, dtype)
        yield tensor
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _build(name: str, recipe: Recipe, tensors: dict[str, Lazy], dtype: torch.dtype) -> Tensor:
    built = recipe.build(*(tensors[part].read(dtype) for part in recipe.parts))
    require_finite(built, name)
    return built
