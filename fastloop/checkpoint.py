"""Checkpoints: directories with `model.safetensors`, `config.json` and `tokenizer.json`.

    config.json    {"format": "fastloop-1", "model": {the fields of ModelConfig}}
    weights        names and shapes of `encoder_shapes` and `decoder_shapes`, one dtype; the matrices of the
                   layers may be int8, fp8 or int4 (fastloop.stored)

Nothing else is loaded. Loading checks everything before it takes memory, names all that is wrong at
once, never unpickles, and maps the weights: a second process that loads the same checkpoint shares its
memory. Other formats are read by `fastloop convert` alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from . import stored
from .config import ConfigError, ModelConfig, from_mapping
from .decoder import Decoder, decoder_shapes
from .encoder import Encoder, encoder_shapes
from .files import CheckpointError, new_directory, parse_json, quote, read_bounded, write_text
from .quantise import Quantised
from .tensorfile import (
    Entry,
    Kind,
    Shape,
    kinds_bytes,
    map_tensors,
    read_header,
    read_tensor,
    require_finite,
    write_tensors,
)
from .text import Tokenizer

__all__ = ["CheckpointError", "Model", "known_models", "load", "resolve", "save"]

FORMAT = "fastloop-1"
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
MODELS = Path(__file__).parent / "models"  # checkpoints that come with the package
WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 256 << 20  # Qwen2.5's is 7 MB
MAX_LAYERS = 1000  # bounds the list of expected names, which is built from the config
SHOWN = 8  # names of one kind in an error
SAMPLE = 64  # values of a tensor that go into the fingerprint


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint in memory: config, weights by name (`encoder_shapes | decoder_shapes`), tokenizer."""

    config: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    quantised: Mapping[str, Quantised] = field(default_factory=dict)  # matrices kept in few bits

    @functools.cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.config, self.weights, self.quantised)

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.config, self.weights, self.quantised)

    @property
    def device(self) -> torch.device:
        return self.weights["decoder.embed.weight"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights["decoder.embed.weight"].dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, the parts of quantised matrices too."""
        parts = [part for matrix in self.quantised.values() for part in stored.parts(matrix)]
        return [*self.weights.values(), *parts]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def precision(self) -> str | None:
        """What most bytes of the decoder's layers are kept as: "int8", "fp8", "int4", or None: floats."""
        found = {m.precision for name, m in self.quantised.items() if name.startswith("decoder.")}
        return next((kept for kept in ("int4", "fp8", "int8") if kept in found), None)

    def to(self, device: torch.device | str) -> Model:
        """The same model with its weights on a device."""
        weights = {name: tensor.to(device) for name, tensor in self.weights.items()}
        matrices = {name: matrix.to(device) for name, matrix in self.quantised.items()}
        return Model(self.config, weights, self.tokenizer, matrices)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of config, names, shapes, dtypes and a sample of the values of every tensor.

        The same on every device; another for another dtype, as that changes what the model computes. The
        threshold is no part of it: sessions and reports name theirs.
        """
        config = dataclasses.asdict(self.config)
        del config["threshold"]
        digest = hashlib.sha256(json.dumps(config, indent=2, sort_keys=True).encode())
        tensors = {name: tensor.detach() for name, tensor in self.weights.items()}
        for name, matrix in self.quantised.items():
            tensors |= {f"{name}.{matrix.precision}": matrix.values, f"{name}.scale": matrix.scale}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLE)].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """float32, bfloat16 or float16, by name or as it is; CheckpointError for anything else."""
    found = WEIGHT_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in WEIGHT_DTYPES.values():
        raise CheckpointError(f"dtype {quote(dtype)}: weights are one of {', '.join(WEIGHT_DTYPES)}")
    return found


def known_models() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{CONFIG}"))


def resolve(path_or_name: str | Path) -> Path:
    """The directory of a checkpoint: a packaged model by its name, or any directory by its path."""
    if path_or_name in (known := known_models()):
        return MODELS / path_or_name
    path = Path(path_or_name)
    if path.is_dir():
        return path
    reason = "is not a directory" if path.exists() else "is neither a known model nor a directory"
    raise CheckpointError(
        f"model {str(path_or_name)!r} {reason}; known models are {', '.join(known) or 'none'}. "
        "A checkpoint of another format is made into a directory by `fastloop convert`."
    )


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every weight, in the order of the sound's path; CheckpointError if absurdly many."""
    for part, layers in (("encoder", config.encoder.layers), ("decoder", config.decoder.layers)):
        if layers > MAX_LAYERS:
            raise CheckpointError(f"config: {part}.layers is {layers}; at most {MAX_LAYERS} are plausible")
    return encoder_shapes(config) | decoder_shapes(config)


def listed(kind: str, items: list[str]) -> list[str]:
    """One line of an error: how many, and the first of them by name; no line if there are none."""
    if not items:
        return []
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return [f"{kind} ({len(items)}): {', '.join(items[:SHOWN])}{more}"]


def weight_problems(
    expected: Mapping[str, Shape], found: Mapping[str, tuple[torch.dtype, Shape]]
) -> list[str]:
    """All that is wrong with a set of tensors, a line each kind; the dtype of most is the right one."""
    both = [name for name in expected if name in found]
    shapes = [
        f"{name} is {list(found[name][1])}, must be {list(expected[name])}"
        for name in both
        if tuple(found[name][1]) != tuple(expected[name])
    ]
    counts = Counter(found[name][0] for name in both if found[name][0] in WEIGHT_DTYPES.values())
    allowed = [counts.most_common(1)[0][0]] if counts else list(WEIGHT_DTYPES.values())
    dtypes = [f"{name} is {found[name][0]}" for name in both if found[name][0] not in allowed]
    return [
        *listed("missing", [name for name in expected if name not in found]),
        *listed("left over", [quote(name) for name in found if name not in expected]),
        *listed("wrong shape", shapes),
        *listed(f"wrong dtype, must be {' or '.join(map(str, allowed))}", dtypes),
    ]


def refuse(what: str, problems: list[str]) -> None:
    """CheckpointError with every problem on a line of its own, if there is one."""
    if problems:
        raise CheckpointError("\n  ".join([f"{what} cannot be used:", *problems]))


def quantised_problems(
    kinds: Mapping[str, Kind], found: Mapping[str, tuple[torch.dtype, Shape]]
) -> list[str]:
    """All that is wrong with the tensors of quantised matrices, a line each kind."""
    wrong = [
        f"{name} is {found[name][0]} {list(found[name][1])}, must be {dtype} {list(shape)}"
        for name, (dtype, shape) in kinds.items()
        if name in found and (found[name][0], tuple(found[name][1])) != (dtype, tuple(shape))
    ]
    return [
        *listed("missing", [name for name in kinds if name not in found]),
        *listed("wrong kind", wrong),
    ]


def tokenizer_problems(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """A tokenizer may not speak ids that the model does not have."""
    if tokenizer.vocab_size <= config.decoder.vocab:
        return []
    return [
        f"{TOKENIZER}: its largest id is {tokenizer.vocab_size - 1}, the model's vocabulary is "
        f"{config.decoder.vocab}: it belongs to another model"
    ]


def is_ours(directory: Path) -> bool:
    """Whether a directory's `config.json` says that it is of our format."""
    path = directory / CONFIG
    return (
        path.is_file() and parse_json(read_bounded(path, MAX_CONFIG_BYTES), str(path)).get("format") == FORMAT
    )


def _read_config(directory: Path) -> ModelConfig:
    path = directory / CONFIG
    values = parse_json(read_bounded(path, MAX_CONFIG_BYTES), str(path))
    if values.get("format") != FORMAT or set(values) != {"format", "model"}:
        raise CheckpointError(
            f'{path}: is not {{"format": "{FORMAT}", "model": ...}}, its keys are {quote(sorted(values))}; '
            "run `fastloop convert` on a checkpoint of another format"
        )
    try:
        return from_mapping(ModelConfig, values["model"], "model")
    except (ConfigError, TypeError, AttributeError) as error:  # the latter: a scalar where a table belongs
        raise CheckpointError(f"{path}: {error}") from error


def read_tokenizer(path: Path) -> str:
    """The text of a `tokenizer.json`; CheckpointError where it is missing or not text."""
    try:
        return read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    try:
        return Tokenizer.from_json(text, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def load(
    path_or_name: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Model:
    """Load a checkpoint: a packaged model by name, or a directory.

    The weights are views of the mapped file; with another dtype or device they are read piece by piece
    into their place. Quantised matrices stay so, on every device; asked for a dtype, they are dequantised.
    The file must not be changed in place while it is mapped (`save` and `fastloop convert` never do that).
    CheckpointError names everything that is wrong.
    """
    directory = resolve(path_or_name)
    absent = [name for name in (CONFIG, WEIGHTS, TOKENIZER) if not (directory / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{directory}: no {', no '.join(absent)}; a checkpoint of another format has to go through "
            "`fastloop convert` first"
        )
    wanted = None if dtype is None else as_dtype(dtype)
    config = _read_config(directory)
    shapes = weight_shapes(config)
    tokenizer = parse_tokenizer(read_tokenizer(directory / TOKENIZER), str(directory / TOKENIZER))
    with _open(directory / WEIGHTS) as file:
        entries = read_header(file, str(directory / WEIGHTS))
        precisions = stored.precisions_in(shapes, entries)
        _refuse_tensors(directory, config, tokenizer, entries, shapes, precisions)
        kept = entries["decoder.embed.weight"].dtype
        if torch.device(device).type == "cpu" and wanted is None:
            tensors = map_tensors(file, entries)
            matrices = {name: stored.joined(name, p, tensors) for name, p in precisions.items()}
            floats = {name: tensors[name] for name in shapes if name not in precisions}
            return Model(config, floats, tokenizer, matrices)
        if torch.device(device).type == "cpu" and wanted == kept and not precisions:
            return Model(config, map_tensors(file, {name: entries[name] for name in shapes}), tokenizer)
        target = wanted or kept
        few = precisions if wanted is None else {}  # what stays quantised
        matrices = {name: _read_quantised(file, name, entries, p, device) for name, p in few.items()}
        weights = {
            name: _read(file, name, entries, precisions.get(name), target, device)
            for name in shapes
            if name not in few
        }
    for name, tensor in weights.items() if wanted not in (None, kept) else ():
        require_finite(tensor, name)
    return Model(config, weights, tokenizer, matrices)


def _refuse_tensors(
    directory: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    entries: Mapping[str, Entry],
    shapes: Mapping[str, Shape],
    precisions: Mapping[str, str],
) -> None:
    """CheckpointError that names everything wrong with the tensors of a file, and with its tokenizer."""
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    group = stored.group_in(shapes, precisions, {name: entry.shape for name, entry in entries.items()})
    kinds = stored.kinds_of({n: shapes[n] for n in precisions}, precisions, torch.float32, group)
    floats = {name: shape for name, shape in shapes.items() if name not in precisions}
    rest = {name: kind for name, kind in found.items() if name not in kinds}
    problems = weight_problems(floats, rest) + quantised_problems(kinds, found)
    refuse(str(directory), problems + tokenizer_problems(config, tokenizer))


def _read(
    file: BinaryIO,
    name: str,
    entries: Mapping[str, Entry],
    precision: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """One weight in a dtype on a device; a quantised matrix dequantised."""
    if precision is None:
        return read_tensor(file, entries[name], dtype, device)
    matrix = _read_quantised(file, name, entries, precision, "cpu")
    return matrix.dequantised().to(device=device, dtype=dtype)


def _read_quantised(
    file: BinaryIO, name: str, entries: Mapping[str, Entry], precision: str, device: torch.device | str
) -> Quantised:
    """One matrix as it is stored, on a device."""
    names = (f"{name}.{precision}", f"{name}.scale")
    pair = {part: read_tensor(file, entries[part], entries[part].dtype, device) for part in names}
    return stored.joined(name, precision, pair)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def save(
    directory: str | Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer_json: str
) -> Path:
    """Write a checkpoint into a new directory; it is there whole or not at all.

    The weights have the names and shapes of `encoder_shapes | decoder_shapes` and one dtype, on any
    device. CheckpointError names everything that is wrong with them, and an existing directory is refused.
    """
    shapes = weight_shapes(config)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    tokenizer = parse_tokenizer(tokenizer_json, "tokenizer_json")
    refuse("this model", weight_problems(shapes, found) + tokenizer_problems(config, tokenizer))
    kinds = stored.kinds_of(shapes, {}, found["decoder.embed.weight"][0])
    return write_checkpoint(directory, config, kinds, (weights[name] for name in shapes), tokenizer_json)


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    kinds: Mapping[str, Kind],
    tensors: Iterable[Tensor],
    tokenizer_json: str,
) -> Path:
    """Write tensors, in the order of `kinds`, as they come; the directory appears when all are there."""
    described = {"format": FORMAT, "model": json.loads(config.to_json())}
    size = kinds_bytes(kinds.values()) + len(tokenizer_json.encode())
    with new_directory(Path(directory), size) as partial:
        write_tensors(partial / WEIGHTS, kinds, tensors)
        write_text(partial / TOKENIZER, tokenizer_json)
        write_text(partial / CONFIG, json.dumps(described, indent=2, sort_keys=True) + "\n")
    return Path(directory)
