"""Rivals in the same run: the same model in plain PyTorch (SDPA, a static cache, one CUDA graph; and
compiled), transformers' Qwen2.5-Omni thinker, flash-attn and FlashInfer where they are installed, and the
published loop's own algorithm. cuBLAS stands beside `linear` in the section `ops`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastloop import ops
from fastloop.mel import log_mel
from fastloop.testing.op_cases import paged_attention_case
from fastloop.testing.timing import Timing

from .clock import measure
from .model import OURS, ListeningStep, Perception, backend, decoder, encoder
from .plain import PlainDecoder, thinker, thinker_step
from .record import Context, Record
from .steps import host_to_host


def run(context: Context, record: Record) -> None:
    """Lines for ours and theirs; values: ratios. A rival that is missing or fails is named; no problem."""
    record.put(ratios={}, missing={})
    histories = (26,) if context.dry else (1024, 4096)
    ours = {h: host_to_host(ListeningStep(context, 1, h, OURS), context) for h in histories}
    for history, timing in ours.items():
        record.line(f"decision at {history}, host to host", OURS, timing)
    _beside("torch + graph", lambda h: _captured(context, h, False), ours, context, record, "decision")
    try:
        _published(context, record)
    except Exception as error:  # as below
        record.values["missing"]["published loop"] = f"{type(error).__name__}: {error}"[:300]
    _beside("transformers", lambda h: _transformers(context, h), _decoder_steps(context, histories), context,
            record, "listening step")  # fmt: skip
    for name, package, call in (
        ("flash_attn", "flash_attn", _flash_attn),
        ("flash_attn, pages, eager", "flash_attn", _flash_attn_pages),
        ("flashinfer", "flashinfer", _flashinfer),
    ):
        if importlib.util.find_spec(package) is None:
            record.values["missing"][package] = "not installed"
        else:
            own = _attention(context, histories)
            _beside(name, lambda h, call=call: call(context, h), own, context, record, "paged_attention")
    # Last, as nobody knows how long it compiles.
    _beside("torch.compile + graph", lambda h: _captured(context, h, True), ours, context, record, "decision")
    record.save()


def _beside(
    name: str,
    measured: Callable[[int], Timing],
    ours: dict[int, Timing],
    context: Context,
    record: Record,
    what: str,
) -> None:
    """A rival at every context that ours was timed at."""
    for history, own in ours.items():
        if context.left_s < 5:
            record.values["missing"][f"{name} at {history}"] = "out of time"
            continue
        try:
            timing = measured(history)
        except Exception as error:  # theirs: named, and the others go on
            record.values["missing"][f"{name} at {history}"] = f"{type(error).__name__}: {error}"[:300]
            continue
        record.line(f"{what} at {history}", name, timing)
        record.values["ratios"][f"{what} at {history}: {name} / ours"] = timing.median / own.median
    record.save()


def _captured(context: Context, history: int, compiled: bool) -> Timing:
    """mel, encoder, decoder and the two logits in plain torch, in one graph."""
    perception = Perception(context, 1)
    plain = PlainDecoder(decoder(context), history, compiled)

    def step() -> Tensor:
        with backend("reference", context):
            tokens = perception.run()
        plain.x[2 : 2 + tokens.shape[1]] = tokens[0].to(plain.x.dtype)
        return plain.two_logits(plain.step(plain.x))

    return measure([step], context.device)


def _published(context: Context, record: Record) -> None:
    """The published live server's algorithm: for every chunk log-mel and encoder run over all sound so far,
    the decoder launches op by op, the head covers the whole vocabulary, and the host reads the argmax.
    """
    config, device = context.config, context.device
    tower = encoder(context)
    for chunks in (2,) if context.dry else (10, 50, 150):
        if context.left_s < 5:
            return
        pcm = 0.1 * torch.randn(chunks * config.chunk_samples, device=device)
        plain = PlainDecoder(decoder(context), chunks * config.chunk_rows, False)

        @torch.inference_mode()
        def decide(pcm: Tensor = pcm, plain: PlainDecoder = plain) -> int:
            with backend("reference", context):
                frames = log_mel(pcm).unflatten(0, (-1, config.chunk_frames))
                tokens = tower.encode(frames)[-1]
                plain.x[2 : 2 + len(tokens)] = tokens.to(plain.x.dtype)
                return int(plain.decoder.logits(plain.step(plain.x)[-1:]).argmax())

        theirs = _wall(decide)
        ours = host_to_host(ListeningStep(context, 1, chunks * config.chunk_rows, OURS), context)
        seconds = chunks * config.chunk_seconds
        record.line(f"decision after {seconds:.0f} s of sound", "published loop", theirs, note="eager")
        record.line(f"decision after {seconds:.0f} s of sound", OURS, ours)
        name = f"decision after {seconds:.0f} s: published loop / ours"
        record.values["ratios"][name] = theirs.median / ours.median
        record.save()


def _wall(call: Callable[[], object], rounds: int = 12) -> Timing:
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return Timing(tuple(seconds[2:]))


def _decoder_steps(context: Context, histories: tuple[int, ...]) -> dict[int, Timing]:
    """Our decoder alone, for rivals that have no encoder here."""
    found = {}
    for history in histories:
        step = ListeningStep(context, 1, history, OURS).step

        def call(step: object = step) -> None:
            with backend(OURS, context):
                step.run()  # type: ignore[attr-defined]

        found[history] = measure([call], context.device)
    return found


def _transformers(context: Context, history: int) -> Timing:
    """Their eager forward of 13 embeddings behind a cache, and the two logits."""
    model = thinker(context)
    return measure([thinker_step(model, context.config, history)], context.device, graph=False)


def _attention_case(context: Context, history: int) -> dict[str, Tensor]:
    d, rows = context.config.decoder, context.config.chunk_rows
    case = paged_attention_case(
        torch.Generator().manual_seed(1), rows=[rows], lens=[history + rows], gaps=[(0, 0)], heads=d.heads,
        kv_heads=d.kv_heads, head_width=d.head_width, page=256, dtype=context.dtype,
    )  # fmt: skip
    return {name: v.nan_to_num(0.0).to(context.device) for name, v in case.arguments.items()}


def _attention(context: Context, histories: tuple[int, ...]) -> dict[int, Timing]:
    found = {}
    for history in histories:
        arguments = _attention_case(context, history)

        def call(arguments: dict[str, Tensor] = arguments) -> None:
            with backend(OURS, context):
                ops.paged_attention(**arguments)

        found[history] = measure([call], context.device)
    return found


def _flash_attn(context: Context, history: int) -> Timing:
    """Its best case: one stream's keys side by side, captured."""
    from flash_attn import flash_attn_with_kvcache

    a = _attention_case(context, history)
    pages = a["block_table"][0, : -(-int(a["kv_lens"][0]) // a["k_pages"].shape[1])].long()
    q, keys, values = a["q"][None], *(a[name][pages].flatten(0, 1)[None] for name in ("k_pages", "v_pages"))
    options = {"cache_seqlens": a["kv_lens"], "causal": True}
    return measure([lambda: flash_attn_with_kvcache(q, keys, values, **options)], context.device)


def _flash_attn_pages(context: Context, history: int) -> Timing:
    """Over pages it reads a length on the host (2.8.4), so no graph can hold it; the host's time counts."""
    from flash_attn import flash_attn_with_kvcache

    a = _attention_case(context, history)
    table = a["block_table"].clamp(max=a["k_pages"].shape[0] - 1)
    q, pools = a["q"][None], (a["k_pages"], a["v_pages"])
    options = {"cache_seqlens": a["kv_lens"], "block_table": table, "causal": True}
    return measure([lambda: flash_attn_with_kvcache(q, *pools, **options)], context.device, graph=False)


def _flashinfer(context: Context, history: int) -> Timing:
    import flashinfer

    a = _attention_case(context, history)
    d, page = context.config.decoder, a["k_pages"].shape[1]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=context.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    length = int(a["kv_lens"][0])
    pages = -(-length // page)
    wrapper.plan(
        a["row_starts"], torch.tensor([0, pages], dtype=torch.int32, device=context.device),
        a["block_table"][0, :pages].contiguous(),
        torch.tensor([length - (pages - 1) * page], dtype=torch.int32, device=context.device), d.heads,
        d.kv_heads, d.head_width, page, causal=True, q_data_type=context.dtype,
    )  # fmt: skip
    pools = (a["k_pages"], a["v_pages"])
    return measure([lambda: wrapper.run(a["q"], pools)], context.device)
