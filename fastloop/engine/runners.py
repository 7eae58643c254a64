"""Which runner an engine gets, and the dtype of its KV pages: from its configuration and its model."""

from __future__ import annotations

import torch

from ..checkpoint import Model
from ..config import ConfigError
from ..decision import DecisionState
from ..mel import MelState
from ..ops.dispatch import forced_backends
from ..ops.native import PAGE_FORMATS, native, reason
from ..options import EngineConfig
from .captured_runner import CapturedRunner
from .kv_cache import KVCache
from .kv_layout import PANEL, TILE, KVLayout, RowLayout, TileLayout, fits_tiles, key_range, kv_scale
from .native_runner import KV_DTYPES, NativeRunner, native_precision
from .runner import EagerRunner, Runner

FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs that convert float8_e4m3fn


def is_native(config: EngineConfig, model: Model) -> bool:
    """Whether the native runner serves this engine; ConfigError where it is asked for and cannot.

    FASTLOOP_BACKEND forces implementations of single ops, so with it "auto" means the eager runner. On a CPU
    quantised weights are for the native runner unless another one is asked for: op by op each of them would
    be widened in every step.
    """
    if config.kv_precision == "fp8":
        _refuse_float8_pages(config, model)
    if config.runner in ("eager", "captured") or config.kv_precision == "fp8":
        return False
    chosen = config.precision != "auto" or config.kv_precision != "auto"
    slow = bool(model.quantised) and model.device.type == "cpu" and not forced_backends()
    wanted = config.runner == "native" or chosen or slow
    why = _not_native(model)
    if wanted and why is not None:
        raise ConfigError(f"EngineConfig.runner: the native runner cannot serve this engine: {why}")
    return wanted or (why is None and not forced_backends())


def _refuse_float8_pages(config: EngineConfig, model: Model) -> None:
    """ConfigError where the engine cannot have float8 pages."""
    where, device = "EngineConfig.kv_precision", model.device
    alone = config.runner == "auto" and device.type == "cpu" and not forced_backends()
    if config.precision != "auto" or alone:
        raise ConfigError(
            f"{where}: fp8 pages are for GPUs (runner 'eager' or 'captured'); the native runner has int8 ones"
        )
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < FLOAT8_CAPABILITY:
        raise ConfigError(
            f"{where}: fp8 pages take sm_89 or newer, {device} is sm_{found[0]}{found[1]}; leave it at 'auto'"
        )


def _not_native(model: Model) -> str | None:
    """Why the native runner cannot serve a model; None if it can."""
    if native is None:
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if any(matrix.precision == "fp8" for matrix in model.quantised.values()):
        return (
            "it has no fp8 weights; load the checkpoint with a dtype, which dequantises it, convert to int8, "
            "or take runner='eager', which widens them in every step"
        )
    return None


def kv_dtype(config: EngineConfig, model: Model) -> torch.dtype:
    """The model's dtype, or float8 if asked for; natively what is asked for, or bfloat16 where the weights
    are less than float32.
    """
    if not is_native(config, model):
        return torch.float8_e4m3fn if config.kv_precision == "fp8" else model.dtype
    if config.kv_precision != "auto":
        return KV_DTYPES[config.kv_precision]
    if native_precision(config.precision, model) != "float32":
        return torch.bfloat16
    return model.dtype if model.dtype in PAGE_FORMATS else torch.float32


def kv_layout(config: EngineConfig, model: Model) -> KVLayout:
    """Tiles for the native runner where the dims allow it, else rows; ConfigError where int8 needs tiles."""
    c, dtype = model.config.decoder, kv_dtype(config, model)
    if is_native(config, model) and fits_tiles(c, config.page_tokens):
        weights = {**model.weights, **model.quantised} if dtype == torch.int8 else {}
        return TileLayout(dtype, c.head_width, key_range(c, weights) if weights else None)
    if dtype == torch.int8:
        raise ConfigError(
            f"EngineConfig.kv_precision: int8 takes page_tokens in multiples of {TILE}, heads of multiples "
            f"of {PANEL} channels, got {config.page_tokens} and {c.head_width}; choose bfloat16"
        )
    if dtype == torch.float8_e4m3fn:
        return RowLayout(dtype, kv_scale(c, {**model.weights, **model.quantised}))
    return RowLayout(dtype)


def _is_captured(config: EngineConfig, model: Model) -> bool:
    """On a GPU "auto" means graphs; with FASTLOOP_BACKEND, whose choice may not be captured, eager."""
    auto = config.runner == "auto" and model.device.type == "cuda" and not forced_backends()
    return config.runner == "captured" or auto


def make_runner(
    config: EngineConfig, model: Model, cache: KVCache, decisions: DecisionState, mel: MelState
) -> Runner:
    """The runner of an engine. `decisions` has one slot more than there are sessions (CapturedRunner)."""
    if _is_captured(config, model):
        return CapturedRunner(model, cache, decisions, mel)
    if not is_native(config, model):
        return EagerRunner(model, cache, decisions, mel)
    return NativeRunner(model, cache, decisions, mel, config.precision, config.threads)
