"""Arrays in: accepted types, the mix to mono, and every refusal with its reason."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastloop.audio import to_mono_float32


@given(
    values=st.lists(st.integers(-32768, 32767), max_size=40),
    channels=st.integers(1, 8),
    first=st.booleans(),
    kind=st.sampled_from(["numpy", "torch"]),
)
def test_int16_is_scaled_and_channels_are_averaged(
    values: list[int], channels: int, first: bool, kind: str
) -> None:
    mono = np.array(values + [5] * 9, dtype=np.int16)  # longer than 8: the channels are unmistakable
    ramp = np.clip(mono[:, None] + np.arange(channels) * 100, -32768, 32767).astype(np.int16)
    pcm = ramp.T if first else ramp
    got = to_mono_float32(torch.from_numpy(np.ascontiguousarray(pcm)) if kind == "torch" else pcm)
    assert got.dtype == np.float32 and got.shape == mono.shape
    # Sums of 8 values below 2^15 are exact in float32; one division rounds.
    assert np.array_equal(got, (ramp.sum(1) / np.float32(channels)).astype(np.float32) / np.float32(32768))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<i2", ">i2"])
def test_every_accepted_dtype_gives_the_same_samples(dtype: str) -> None:
    exact = np.array([0, 1, -1, 0.5, -0.25], dtype=np.float64)  # exact in every one of them, save +1 as int16
    exact[1] = 0.75
    pcm = (exact * 32768 if dtype.endswith("i2") else exact).astype(dtype)
    assert np.array_equal(to_mono_float32(pcm), exact.astype(np.float32))


@pytest.mark.parametrize("channels", range(2, 9))
def test_the_layout_does_not_change_a_bit_of_the_mix(channels: int) -> None:
    pcm = np.random.default_rng(channels).uniform(-1, 1, (1000, channels)).astype(np.float32)
    assert np.array_equal(to_mono_float32(pcm), to_mono_float32(pcm.T))
    assert np.array_equal(to_mono_float32(pcm), to_mono_float32(np.ascontiguousarray(pcm.T)))


def test_the_result_owns_its_memory() -> None:
    pcm = np.zeros(10, dtype=np.float32)
    got = to_mono_float32(pcm)
    pcm[:] = 1
    assert not got.any()


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0), (0, 8)])
def test_no_samples_are_a_valid_push(shape: tuple[int, ...]) -> None:
    assert to_mono_float32(np.empty(shape, dtype=np.int16)).shape == (0,)


def test_gradients_are_left_behind() -> None:
    assert to_mono_float32(torch.ones(3, requires_grad=True)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("pcm", "message"),
    [
        (np.zeros(4, dtype=np.int32), "int32.*2147483648"),
        (np.zeros(4, dtype=np.uint8), "uint8"),
        (np.zeros(4, dtype=np.float16), "float16"),
        (np.zeros(4, dtype=np.complex64), "complex64"),
        (np.zeros(4, dtype=bool), "bool"),
        (np.array(["a"]), "<U1"),
        (torch.zeros(4, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, dtype=torch.int64), "int64"),
        ([0.0, 1.0], "a list.*numpy.asarray"),
        (b"\0\0", "a bytes"),
        (None, "NoneType"),
    ],
)
def test_other_types_are_refused(pcm: object, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^mic: .*{message}"):
        to_mono_float32(pcm, where="mic")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), "0 dimensions"),
        ((2, 3, 4), r"3 dimensions \[2, 3, 4\]"),
        ((9, 9), "no dimension of 1 to 8"),
        ((100, 0), "no dimension of 1 to 8"),
        ((2, 2), "samples by channels and as channels by samples"),
        ((1, 2), "samples by channels and as channels by samples"),
        ((3, 8), "samples by channels and as channels by samples"),
    ],
)
def test_shapes_that_are_no_stream_are_refused(shape: tuple[int, ...], message: str) -> None:
    pcm = np.zeros(shape, dtype=np.float32)
    for form in (pcm, torch.from_numpy(pcm), pcm[()]):  # pcm[()]: a scalar where there is no dimension
        with pytest.raises(ValueError, match=rf"^pcm: .*{message}"):
            to_mono_float32(form)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 8.5, -20000.0, 1e300])
@pytest.mark.parametrize("shape", [(50,), (50, 2), (2, 50)])
@given(data=st.data())
def test_the_first_bad_sample_is_named(bad: float, shape: tuple[int, ...], data: st.DataObject) -> None:
    pcm = np.zeros(shape, dtype=np.float64)
    places = sorted(data.draw(st.sets(st.integers(0, pcm.size - 1), min_size=1, max_size=3)))
    pcm.flat[places] = bad
    index = [int(i) for i in np.unravel_index(places[0], shape)]
    reason = "32768" if np.isfinite(bad) else "finite"
    with pytest.raises(ValueError) as caught:
        to_mono_float32(pcm)
    assert f"sample {index} is" in str(caught.value) and reason in str(caught.value)


def test_loud_sound_up_to_eight_times_full_scale_is_sound() -> None:
    assert to_mono_float32(np.array([8.0, -8.0])).tolist() == [8.0, -8.0]


def test_samples_at_16_khz_need_neither_libsndfile_nor_soxr() -> None:
    """A server that only gets samples runs without them; files and other rates say what is missing."""
    script = """
import sys
sys.modules["soundfile"] = sys.modules["soxr"] = None  # as if they were not installed
import numpy as np
import fastloop.audio
from fastloop.engine import Engine
assert len(fastloop.audio.Resampler(16_000).push(np.zeros(160, np.float32))) == 160
for use, missing in ((lambda: fastloop.audio.read("x.wav"), "soundfile"),
                     (lambda: fastloop.audio.Resampler(8000), "soxr")):
    try:
        use()
    except ImportError as error:
        assert missing in str(error), error
    else:
        raise AssertionError(missing)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
