"""The CUDA kernels of mel, paged_attention, decide and sample, run on the CPU: against the ops' definitions.

Threads take turns in an order drawn from a seed, shared memory and results begin as NaN, asynchronous copies
arrive as late as they may (tests/native/cuda_emulation). What runs on a GPU is the same source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Generator, Tensor

from fastloop.mel import MelState
from fastloop.ops.mel import CLAMPS, EDGES, LOOKAHEAD_SAMPLES, mel_filters, mel_ref
from fastloop.testing.mel_oracle import clamped, log_power, whisper_frames
from fastloop.testing.op_cases import Case, mel_case, paged_attention_case
from fastloop.testing.selfcheck import compare
from fastloop.testing.tolerance import error_bound, relative_error

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NAMES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3",
}
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])
examples = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def generator(seed: int = 1) -> Generator:
    return torch.Generator().manual_seed(seed)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype)


@dataclass
class Kernels:
    """Calls of the ops as launches of the kernels. seed: of the order of threads; blocks: in a grid that may
    have any size.
    """

    emulation: ModuleType
    seed: int = 0
    blocks: int = 3
    resident: int = 2
    libraries: dict[str, Any] = field(default_factory=dict)

    def launch(self, kernel: str, grid: list[int], threads: int, *arguments: Any, shared: int = 0) -> None:
        op = next(op for op in ("mel", "paged_attention", "decide", "sample") if kernel.startswith(op))
        if op not in self.libraries:
            self.libraries[op] = self.emulation.build([SOURCES / f"{op}.cu"])
        options = {"shared": shared, "seed": self.seed, "resident": self.resident}
        self.libraries[op].launch(kernel, grid, [threads], *arguments, **options)

    def mel(
        self,
        pcm: Tensor,
        slots: Tensor,
        tail: Tensor,
        peak: Tensor,
        seen: Tensor,
        filters: Tensor,
        bands: Tensor,
        edge: str = "reflect",
        clamp: str = "running",
    ) -> Tensor:
        (streams, samples), bins = pcm.shape, len(filters)
        frames = poisoned(streams, samples // 160, bins)
        modes = EDGES.index(edge), 1 - CLAMPS.index(clamp)
        self.launch(
            "mel", [streams], 448, pcm, slots, tail, peak, seen, filters, bands, frames, pcm.stride(0),
            samples, bins, *modes, shared=100 * 1024,
        )  # fmt: skip
        return frames

    def paged_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        block_table: Tensor,
        row_starts: Tensor,
        kv_lens: Tensor,
        gaps: Tensor,
    ) -> Tensor:
        (_, heads, head), (page, groups) = q.shape, k_pages.shape[1:3]
        sums, scales = (poisoned(2 * self.blocks, groups, 128, width) for width in (head, 2))
        arrived = torch.zeros(self.blocks, groups, dtype=torch.int32)
        out = poisoned(*q.shape, dtype=q.dtype)
        kernel = f"paged_attention_{NAMES[q.dtype]}_{NAMES[k_pages.dtype]}_{64 if head <= 64 else 128}"
        self.launch(
            kernel, [self.blocks, groups], 256, q, k_pages, v_pages, block_table, row_starts, kv_lens, gaps,
            out, sums, scales, arrived, len(kv_lens), heads, head, page, block_table.stride(0), head**-0.5,
            shared=128 * 1024,
        )  # fmt: skip
        assert not arrived.any()
        return out


@dataclass
class Emulated:
    """One op, as fastloop.testing calls implementations."""

    op: str
    kernels: Kernels

    def __call__(self, **arguments: Any) -> Any:
        return getattr(self.kernels, self.op)(**arguments)


@pytest.fixture(scope="module")
def built(emulation: ModuleType) -> Kernels:
    return Kernels(emulation)


@pytest.fixture
def kernels(built: Kernels) -> Kernels:
    return Kernels(built.emulation, libraries=built.libraries)


@pytest.fixture
def check(kernels: Kernels) -> Callable[..., None]:
    """`check(op, case, seed=..., blocks=...)`: within the bound of the definition, nothing else touched."""

    def run(op: str, case: Case, **options: int) -> None:
        for name, value in options.items():
            setattr(kernels, name, value)
        found = compare(Emulated(op, kernels), case)
        assert found.ok, found.problem

    return run


# paged_attention

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float16),
]
every_dtype = pytest.mark.parametrize(("dtype", "pages"), DTYPES, ids=lambda d: NAMES[d])


@every_dtype
@every_seed
@pytest.mark.parametrize("blocks", [1, 4, 40])
def test_attention_of_split_contexts(
    check: Callable[..., None], dtype: torch.dtype, pages: torch.dtype, seed: int, blocks: int
) -> None:
    """A listener, a speaker, a padded sequence and speculation; gaps that are larger than a piece."""
    case = paged_attention_case(
        generator(seed), rows=(13, 1, 0, 26), lens=(400, 333, 0, 90), heads=16, kv_heads=2, head_width=64,
        gaps=((5, 170), (0, 300), (0, 0), (3, 60)), dtype=dtype, page_dtype=pages,
    )  # fmt: skip
    check("paged_attention", case, seed=seed, blocks=blocks)


@every_dtype
@pytest.mark.parametrize("head_width", [8, 40, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (6, 3), (40, 1)])
def test_attention_of_any_heads(
    check: Callable[..., None],
    dtype: torch.dtype,
    pages: torch.dtype,
    head_width: int,
    heads: int,
    kv_heads: int,
) -> None:
    """Tiles of packed rows that begin in the middle of a row's heads."""
    width = -(-head_width // 16) * 16 if pages == torch.float8_e4m3fn else head_width
    case = paged_attention_case(
        generator(3), rows=(5, 1, 13), lens=(150, 12, 77), gaps=((3, 9), (0, 0), (64, 64)), page=7,
        heads=heads, kv_heads=kv_heads, head_width=width, dtype=dtype, page_dtype=pages,
    )  # fmt: skip
    check("paged_attention", case, blocks=5)


@every_dtype
@pytest.mark.parametrize("page", [1, 16, 64, 256])
def test_attention_of_any_page(
    check: Callable[..., None], dtype: torch.dtype, pages: torch.dtype, page: int
) -> None:
    case = paged_attention_case(
        generator(4), rows=(13, 1), lens=(130, 65), gaps=((6, 10), (6, 8)), page=page, dtype=dtype,
        page_dtype=pages,
    )  # fmt: skip
    check("paged_attention", case, blocks=2, seed=page)


@pytest.mark.parametrize("blocks", [1, 7])
def test_attention_of_many_sequences(check: Callable[..., None], blocks: int) -> None:
    """More than there are threads: each thread counts the steps of several."""
    rows = [(1, 0, 13)[b % 3] if b % 50 == 0 else int(b % 7 == 0) for b in range(300)]
    lens = [count + 3 * b % 70 if count else 0 for b, count in enumerate(rows)]
    case = paged_attention_case(
        generator(5), rows=rows, lens=lens, gaps=[(0, 0)] * 300, dtype=torch.bfloat16, heads=2, kv_heads=1
    )
    check("paged_attention", case, blocks=blocks)


@examples
@given(data=st.data())
def test_attention_of_ragged_batches(check: Callable[..., None], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4), label="rows")
    lens, gaps = [], []
    for count in rows:
        lens.append(count + data.draw(st.integers(0 if count else 1, 300), label="context"))
        begin = data.draw(st.integers(0, lens[-1] - count), label="gap begin")
        gaps.append((begin, data.draw(st.integers(begin, lens[-1] - count), label="gap end")))
    options = {name: data.draw(st.integers(1, 9), label=name) for name in ("seed", "blocks", "resident")}
    dtype, pages = data.draw(st.sampled_from(DTYPES), label="dtypes")
    case = paged_attention_case(
        generator(options["seed"]), rows=rows, lens=lens, gaps=gaps, dtype=dtype, page_dtype=pages,
        heads=8, kv_heads=1,
    )  # fmt: skip
    check("paged_attention", case, **options)


@every_dtype
def test_attention_repeats_to_the_bit(kernels: Kernels, dtype: torch.dtype, pages: torch.dtype) -> None:
    """Whichever block is the last one of a tile."""
    case = paged_attention_case(
        generator(8), rows=(13, 1), lens=(500, 177), gaps=((0, 0),) * 2, heads=8, kv_heads=1, dtype=dtype,
        page_dtype=pages,
    )  # fmt: skip
    kernels.blocks, outs = 5, []
    for seed in range(4):
        kernels.seed, kernels.resident = seed, seed + 1
        outs.append(kernels.paged_attention(**case.arguments))
    assert all(torch.equal(out, outs[0]) for out in outs)


@every_dtype
@pytest.mark.parametrize("place", ["q", "k_pages", "v_pages"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_attention_keeps_what_is_not_finite_in_its_sequence(
    kernels: Kernels, dtype: torch.dtype, pages: torch.dtype, place: str, poison: float
) -> None:
    case = paged_attention_case(
        generator(7), rows=(13, 1, 13), lens=(30, 140, 25), gaps=((2, 5),) * 3, dtype=dtype, page_dtype=pages
    )
    a = case.arguments
    clean = kernels.paged_attention(**a)
    if place == "q":
        a["q"][13] = poison
    else:
        page, offset = divmod(139, a["k_pages"].shape[1])
        a[place][int(a["block_table"][1, page]), offset] = poison
    dirty = kernels.paged_attention(**a)
    others = torch.arange(27) != 13
    assert torch.equal(dirty[others], clean[others])
    infinite = poison == poison and place != "q" and pages == torch.float8_e4m3fn  # which has no infinity
    if not infinite and (poison != poison or place != "k_pages"):  # a key of +-Inf may score -Inf: weight 0
        assert not dirty[13].isfinite().any()


# mel


@dataclass
class Streams:
    """B streams in slots of a larger state."""

    kernels: Kernels
    state: MelState
    slots: Tensor
    bins: int = 128

    def call(self, pcm: Tensor, edge: str = "reflect", clamp: str = "running") -> Tensor:
        state = (self.state.tail, self.state.peak, self.state.seen)
        return self.kernels.mel(pcm, self.slots, *state, *mel_filters(bins=self.bins), edge, clamp)


def streams(kernels: Kernels, slots: list[int], capacity: int = 0, bins: int = 128) -> Streams:
    return Streams(kernels, MelState.empty(capacity or max(slots) + 1), torch.tensor(slots), bins)


def sound(seed: int, count: int, samples: int) -> Tensor:
    """Noise with a tone in it: both the loud and the faint end of the range are there."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    noise = rng.normal(size=(count, samples)) * 10.0 ** rng.uniform(-4, 0, (count, 1))
    tone = np.sin(2 * np.pi * rng.uniform(60, 7900, (count, 1)) * t)
    return torch.from_numpy((0.1 * (noise + tone)).astype(np.float32))


@every_seed
@pytest.mark.parametrize("samples", [480, 6400, 6400 + 37, 16_000])
def test_mel_of_the_first_call(check: Callable[..., None], seed: int, samples: int) -> None:
    """Also of more frames than a block holds at a time."""
    check("mel", mel_case(generator(seed), streams=2, samples=samples), seed=seed)


@examples
@given(
    seed=st.integers(0, 2**32 - 1),
    edge=st.sampled_from(EDGES),
    hops=st.lists(st.integers(1, 50), min_size=2, max_size=3),
)
def test_mel_is_inside_the_oracles_interval(kernels: Kernels, seed: int, edge: str, hops: list[int]) -> None:
    """Calls of any number of hops, one after the other."""
    pcm = sound(seed, 2, 160 * sum(hops) + LOOKAHEAD_SAMPLES)
    group, rest = streams(kernels, [3, 1], 5), pcm
    if edge == "wait":
        for slot, row in zip([3, 1], pcm, strict=True):
            group.state.prime(slot, row[:LOOKAHEAD_SAMPLES])
        rest = pcm[:, LOOKAHEAD_SAMPLES:]
    done = 0
    for count in hops:
        frames = group.call(rest[:, 160 * done : 160 * (done + count)], edge)
        before, done = done, done + count
        for row, stream in zip(frames, pcm, strict=True):
            y = log_power(stream if edge == "wait" else stream[: 160 * done])[:done]
            wanted = clamped(y[before:], y) if edge == "wait" else clamped(y, y)[before:]
            assert not wanted.misses(row), wanted.misses(row)


@pytest.mark.parametrize("bins", [1, 7, 80, 127, 201])
def test_mel_of_any_number_of_bins(kernels: Kernels, bins: int) -> None:
    pcm = sound(1, 2, 800)
    frames = streams(kernels, [1, 0], bins=bins).call(pcm)
    assert frames.shape == (2, 5, bins)
    for row, stream in zip(frames, pcm, strict=True):
        assert not whisper_frames(stream, bins).misses(row)


def test_mel_of_filters_that_do_not_fit_into_shared_memory(kernels: Kernels) -> None:
    """Dense ones, whose weights stay where they are."""
    filters = torch.rand(20, 201, generator=generator(2))
    bands = torch.tensor([[0, 201]] * 20, dtype=torch.int32)
    pcm, results = sound(2, 1, 800), []
    for function in (kernels.mel, mel_ref):
        state = MelState.empty(1)
        a = (pcm, torch.tensor([0]), state.tail, state.peak, state.seen, filters, bands)
        results.append(function(*a))
    assert (results[0] - results[1]).abs().max() < 2**-20


@pytest.mark.parametrize("extra", [0, 1, 39, 41, 159])
def test_mel_of_a_last_call_of_any_length(kernels: Kernels, extra: int) -> None:
    """And the tail is kept whole over calls shorter than itself."""
    pcm = sound(extra, 1, 480 + extra)
    group = streams(kernels, [0])
    frames = torch.cat([group.call(pcm[:, a:b]) for a, b in ((0, 160), (160, 320), (320, None))], dim=1)
    assert not whisper_frames(pcm[0])[2:].misses(frames[0, 2:])
    assert torch.equal(group.state.tail, pcm[:, -360:])


def test_mel_errs_at_most_twice_as_much_as_torch(kernels: Kernels) -> None:
    """Typical error, not worst case: noise, tones and both, against float64."""
    pcm = sound(7, 4, 2400)
    state = MelState.empty(4)
    plain = mel_ref(pcm, torch.arange(4), state.tail, state.peak, state.seen, *mel_filters())
    window = torch.hann_window(400, dtype=torch.float64)
    power = torch.stft(pcm.double(), 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    y = (mel_filters()[0].double() @ power).clamp(min=1e-10).log10()
    truth = ((torch.maximum(y, y.amax((1, 2), keepdim=True) - 8) + 4) / 4).mT
    error = relative_error(streams(kernels, [0, 1, 2, 3]).call(pcm), truth)
    assert 0 < error <= error_bound(plain, truth, torch.float32)


def test_mel_is_bit_equal_alone_and_in_a_batch(kernels: Kernels) -> None:
    pcm = sound(2, 5, 960)
    alone, beside = streams(kernels, [0]), streams(kernels, [0, 1, 2, 3, 4])
    for begin in (0, 320):
        kernels.seed = begin
        together = beside.call(pcm[:, begin : begin + 320])
        assert torch.equal(together[4], alone.call(pcm[4:5, begin : begin + 320])[0])
    for name, value in alone.state.export(0).items():
        assert torch.equal(beside.state.export(4)[name], value), name


def test_mel_touches_no_other_slot(kernels: Kernels) -> None:
    group = streams(kernels, [1, 4], capacity=6)
    idle = torch.tensor([0, 2, 3, 5])
    group.state.tail[idle], group.state.peak[idle], group.state.seen[idle] = torch.nan, torch.nan, -77
    pcm = torch.full((2, 2000), torch.nan)
    pcm[:, 300:1260] = sound(4, 2, 960)  # samples that are not contiguous
    assert group.call(pcm[:, 300:1260]).isfinite().all()
    assert group.state.tail[idle].isnan().all() and group.state.peak[idle].isnan().all()
    assert (group.state.seen[idle] == -77).all()
    assert group.state.seen[group.slots].tolist() == [960, 960]
    assert torch.equal(group.state.tail[group.slots], pcm[:, 900:1260])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_mel_keeps_what_is_not_finite_in_its_stream(kernels: Kernels, poison: float) -> None:
    """...and it stays visible there, until the slot is reset."""
    pcm = sound(5, 3, 3 * 320)
    dirty = pcm.clone()
    dirty[1, 400] = poison
    clean_run, dirty_run = streams(kernels, [0, 1, 2]), streams(kernels, [0, 1, 2])
    for begin in (0, 320, 640):
        clean = clean_run.call(pcm[:, begin : begin + 320])
        spoilt = dirty_run.call(dirty[:, begin : begin + 320])
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
        assert spoilt[1].isfinite().all() if begin == 0 else not spoilt[1].isfinite().any()
    dirty_run.state.reset(torch.ones(3, dtype=torch.bool))
    assert dirty_run.call(pcm[:, :320]).isfinite().all()


def test_mel_of_a_long_stream_counts_on(kernels: Kernels) -> None:
    pcm = sound(6, 1, 960)
    young, old = streams(kernels, [0]), streams(kernels, [0])
    young.call(pcm[:, :480])
    old.state.load(0, young.state.export(0))
    old.state.seen[0] += 160 * 10**13
    assert torch.equal(young.call(pcm[:, 480:]), old.call(pcm[:, 480:]))
    assert int(old.state.seen[0]) == 160 * 10**13 + 960


def test_mel_with_a_global_clamp_uses_the_given_peak_and_leaves_it(kernels: Kernels) -> None:
    group = streams(kernels, [0, 1])
    group.state.peak[:] = torch.tensor([9.0, -2.0])
    frames = group.call(sound(8, 2, 800), clamp="global")
    assert group.state.peak.tolist() == [9.0, -2.0]
    assert (frames[0] == 5 / 4).all()  # (9 - 8 + 4) / 4: everything is below the clamp
    assert frames[1].min() >= (-10 + 4) / 4


def test_mel_of_silence(kernels: Kernels) -> None:
    """Power 0: the floor of 1e-10 everywhere."""
    frames = streams(kernels, [0]).call(torch.zeros(1, 480))
    torch.testing.assert_close(frames, torch.full_like(frames, (-10 + 4) / 4), rtol=2**-22, atol=0)
