"""The ops: one file per op with its contract, its definition (`X_ref`), and its bytes moved.

Importing this package registers every op as `torch.ops.fastloop.<name>`.
"""

from .block_attention import block_attention, block_attention_ref
from .conv_stem import conv_stem, conv_stem_ref
from .cuda import register_cuda
from .decide import decide, decide_ref
from .dispatch import REGISTRY, BackendError, Op, use_backend
from .flash_attn import register_flash_attn
from .layer_norm import layer_norm, layer_norm_ref
from .linear import linear, linear_ref
from .linear_quantised import linear_quantised, linear_quantised_ref
from .mel import mel, mel_ref
from .paged_attention import paged_attention, paged_attention_ref
from .rms_norm import rms_norm, rms_norm_ref
from .rope_append import rope_append, rope_append_ref
from .sample import sample, sample_ref
from .triton import register_triton

register_triton(REGISTRY.values())
register_cuda(REGISTRY.values())
register_flash_attn(paged_attention)

__all__ = [
    "REGISTRY",
    "BackendError",
    "Op",
    "block_attention",
    "block_attention_ref",
    "conv_stem",
    "conv_stem_ref",
    "decide",
    "decide_ref",
    "layer_norm",
    "layer_norm_ref",
    "linear",
    "linear_quantised",
    "linear_quantised_ref",
    "linear_ref",
    "mel",
    "mel_ref",
    "paged_attention",
    "paged_attention_ref",
    "rms_norm",
    "rms_norm_ref",
    "rope_append",
    "rope_append_ref",
    "sample",
    "sample_ref",
    "use_backend",
]
