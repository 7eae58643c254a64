"""Foreign checkpoints -> ours, one tensor at a time: the published layout, and Hugging Face Qwen2.5-Omni.

What is done to the weights: q, k and v are joined to row blocks [Q | K | V] (the encoder's missing k bias
is zero), gate and up to [gate; up], and everything gets one dtype. Both formats get the published
protocol's token ids and system prompt; a base Qwen2.5-Omni has the vocabulary for them, not the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint, stored
from ..checkpoint import WEIGHT_DTYPES, listed, parse_tokenizer, read_tokenizer, refuse, weight_shapes
from ..config import PUBLISHED_SYSTEM_PROMPT, PUBLISHED_TOKENS, ConfigError, ModelConfig
from ..files import CheckpointError, quote
from ..quantise import GROUPS, QUANTISERS
from ..tensorfile import kinds_bytes, require_finite
from ..testing.tolerance import relative_error
from . import published, thinker
from .recipes import Recipe, Recipes, encoder_recipes, published_recipes, thinker_recipes
from .sources import Lazy, pickled_file, safetensors_directory

__all__ = ["Report", "convert"]

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)
READABLE = (*WEIGHT_DTYPES.values(), torch.float64)


@dataclass(frozen=True)
class Report:
    """What `convert` did."""

    source_format: str  # "published", "hugging-face" or "fastloop"
    destination: Path
    config: ModelConfig
    dtype: torch.dtype
    tensors: int
    weight_bytes: int
    cast: dict[str, int]  # source tensors that had another dtype: dtype -> how many
    unused: tuple[str, ...]  # source tensors left out on purpose
    precision: str | None = None  # "int8", "fp8", "int4": what was asked for the matrices of the layers
    kept: dict[str, str] = field(default_factory=dict)  # what each is kept in: int8 where int4 does not fit
    errors: dict[str, float] = field(default_factory=dict)  # ||kept - read|| / ||read|| of those matrices


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
    group: int = GROUPS[0],
    progress: Progress | None = None,
) -> Report:
    """Convert a foreign checkpoint directory into a new directory that `checkpoint.load` reads.

    Args:
        trust_pickle: the published layout keeps its encoder in a pickle; read it only if this is True.
        dtype: float32, bfloat16 or float16; None keeps the dtype of the decoder's embedding. int8, int4, or
            fp8 for GPUs, quantises the matrices of the layers (fastloop.stored); the rest is then bfloat16.
        group: int4 only: inputs that share a scale, 32 or 64. 64 is faster and errs more.
        progress: called after every tensor with (bytes written, bytes in all).

    CheckpointError names everything that is missing, left over, mis-shaped or unsupported; the
    destination then does not exist. Memory: the largest of our tensors and its parts.
    """
    source, destination = Path(source), Path(destination).absolute()
    foreign = _open(source, destination.name, trust_pickle)
    if dtype is None and foreign.source_format == "fastloop":
        raise CheckpointError(
            f"{source}: a fastloop checkpoint already; it loads as it is. Give a dtype to cast or quantise it"
        )
    refuse(str(source), _problems(foreign))
    precision = dtype if isinstance(dtype, str) and dtype in QUANTISERS else None
    if group not in GROUPS or (group != GROUPS[0] and precision != "int4"):
        raise CheckpointError(
            f"group {group}: int4 has groups of {GROUPS[0]} or {GROUPS[1]}, nothing else has"
        )
    if isinstance(dtype, str) and dtype not in (*WEIGHT_DTYPES, *QUANTISERS):
        known = ", ".join((*WEIGHT_DTYPES, *QUANTISERS))
        raise CheckpointError(f"dtype {quote(dtype)}: weights are one of {known}")
    if precision:
        dtype = torch.bfloat16
    elif dtype is None:
        (embedding,) = foreign.recipes["decoder.embed.weight"].parts
        dtype = foreign.tensors[embedding].dtype
    target = checkpoint.as_dtype(dtype)
    shapes = weight_shapes(foreign.config)
    wanted = {name: stored.precision_of(name, shape, precision, group) for name, shape in shapes.items()}
    precisions = {name: kept for name, kept in wanted.items() if kept is not None}
    kinds = stored.kinds_of(shapes, precisions, target, group)
    total = kinds_bytes(kinds.values())
    errors: dict[str, float] = {}
    written = _built(foreign, target, precisions, group, total, errors, progress)
    checkpoint.write_checkpoint(destination, foreign.config, kinds, written, foreign.tokenizer_json)
    cast: dict[str, int] = {}
    for recipe in foreign.recipes.values():
        for part in recipe.parts:
            if (have := foreign.tensors[part].dtype) != target:
                cast[str(have)] = cast.get(str(have), 0) + 1
    return Report(
        foreign.source_format,
        destination,
        foreign.config,
        target,
        len(kinds),
        total,
        cast,
        foreign.unused,
        precision,
        precisions,
        errors,
    )


def _open(source: Path, name: str, trust_pickle: bool) -> Foreign:
    """Find out the format and read everything but the tensors' data."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: {'is not a directory' if source.exists() else 'does not exist'}")
    try:
        if (source / published.CONFIG).is_file():
            return _open_published(source, name, trust_pickle)
        if checkpoint.is_ours(source):
            return _open_ours(source)
        if (source / thinker.CONFIG).is_file():
            return _open_thinker(source, name)
    except ConfigError as error:  # sizes that do not fit together, or an id outside the vocabulary
        raise CheckpointError(f"{source}: {error}") from error
    raise CheckpointError(
        f"{source}: neither {published.CONFIG} (the published layout) nor {thinker.CONFIG} "
        "(a Hugging Face Qwen2.5-Omni directory)"
    )


def _open_ours(source: Path) -> Foreign:
    """One of our own, to be cast or quantised; it keeps its name."""
    model = checkpoint.load(source)
    if model.quantised:
        raise CheckpointError(f"{source}: is {model.precision} already; convert what it was made from")
    tensors = {
        key: Lazy(tensor.dtype, tuple(tensor.shape), tensor.to) for key, tensor in model.weights.items()
    }
    recipes = {key: Recipe({key: tensor.shape}, _itself) for key, tensor in tensors.items()}
    return Foreign("fastloop", model.config, tensors, recipes, (), model.tokenizer.to_json())


def _itself(tensor: Tensor) -> Tensor:
    return tensor


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


def _built(
    foreign: Foreign,
    dtype: torch.dtype,
    precisions: dict[str, str],
    group: int,
    total: int,
    errors: dict[str, float],
    progress: Progress | None,
) -> Iterator[Tensor]:
    """What is stored, in its order; each weight is read, cast, joined, quantised when it is asked for."""
    done = 0
    for name in weight_shapes(foreign.config):
        for tensor in _parts(name, foreign, dtype, precisions.get(name), group, errors):
            yield tensor
            done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _parts(
    name: str,
    foreign: Foreign,
    dtype: torch.dtype,
    precision: str | None,
    group: int,
    errors: dict[str, float],
) -> tuple[Tensor, ...]:
    """The tensors of one weight: itself, or the two of a quantised matrix, whose error is noted."""
    if precision is None:
        return (_build(name, foreign.recipes[name], foreign.tensors, dtype),)
    exact = _build(name, foreign.recipes[name], foreign.tensors, torch.float32)
    matrix = QUANTISERS[precision](exact, group)
    errors[name] = relative_error(matrix.dequantised(), exact)
    return stored.parts(matrix)


def _build(name: str, recipe: Recipe, tensors: dict[str, Lazy], dtype: torch.dtype) -> Tensor:
    built = recipe.build(*(tensors[part].read(dtype) for part in recipe.parts))
    require_finite(built, name)
    return built
