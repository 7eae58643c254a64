"""Recipes of frames: pieces of kept streams joined, in other voices, rooms, noise and at another tempo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from fastloop.soundflow.augment import Augment, centres_hz, draw_move, draw_settings, draw_tempo, draw_voice
from fastloop.soundflow.batches import played
from fastloop.soundflow.features import clamp
from fastloop.soundflow.recipe import FLOOR, Piece, Row, frames_of, mix, recipe, ring_on
from fastloop.soundflow.shards import Turn
from fastloop.testing.tolerance import relative_error

EPS = torch.finfo(torch.float32).eps
STILL = draw_move(Augment(), np.random.default_rng(0))  # moves nothing


def powers(frames: torch.Tensor) -> torch.Tensor:
    """The model's frames [N, F, C] -> log10 power [N F, C], above what was 8 below the loudest."""
    return frames.flatten(0, 1) * 4 - 4


def test_a_row_that_is_not_moved_is_its_pieces() -> None:
    kept = torch.randn(400, 128).half()
    rows = [Row([Piece(40, 100), Piece(300, 90)], 1.0, STILL), Row([Piece(7, 160)], 1.0, STILL, Piece(0, 80))]
    found = frames_of(kept, recipe(rows, 160), 40)
    joined = torch.cat((kept[40:140], kept[300:360], kept[7:167])).float()
    assert torch.equal(found, clamp(joined.view(2, 4, 40, 128)).flatten(0, 1))


@pytest.mark.parametrize("factor", [0.88, 1.0, 1.12])
def test_a_voice_moves_a_tone_to_the_frequency_it_says(factor: float) -> None:
    bins = centres_hz()
    kept = torch.full((80, 128), -8.0).half()
    kept[:, 60] = 0.0
    told = recipe([Row([Piece(0, 40), Piece(40, 40, factor)], 1.0, STILL)], 80)
    first, second = (bins[int(frames.argmax())] for frames in powers(frames_of(kept, told, 40))[[0, 79]])
    assert first == bins[60]
    assert abs(second - factor * bins[60]) <= bins[61] - bins[60]


def test_mixing_adds_powers() -> None:
    loud, soft = torch.randn(2, 200, 128), torch.randn(2, 200, 128)
    quieter = torch.tensor([0.7, 2.0])
    level = loud.double().mean(-1).amax(-1) - soft.double().mean(-1).amax(-1) - quieter
    expected = (10.0 ** loud.double() + 10.0 ** (soft.double() + level[:, None, None])).log10()
    assert relative_error(mix(loud, soft, quieter), expected) < 16 * EPS


def test_noise_is_repeated_through_the_row_it_is_for() -> None:
    kept = torch.full((200, 128), -3.0).half()
    kept[160:] = torch.linspace(-5.0, -4.0, 40)[:, None].half()
    move = STILL._replace(quieter=0.5)
    rows = [Row([Piece(0, 160)], 1.0, STILL, Piece(160, 40)), Row([Piece(0, 160)], 1.0, move, Piece(160, 40))]
    alone, noisy = powers(frames_of(kept, recipe(rows, 160), 40)).view(2, 4, 40, 128)
    assert torch.equal(alone, torch.full_like(alone, -3.0))
    assert torch.equal(noisy, noisy[:1].expand_as(noisy))
    below = kept[160:, 9].double() - kept[160:].amax()
    expected = (10**-3.0 + 10 ** (-3.0 - 0.5 + below)).log10()
    assert relative_error(noisy[0, :, 9], expected) < 16 * EPS


@pytest.mark.parametrize("reverberation_s", [0.2, 0.6])
def test_a_click_rings_on_in_a_room_and_decays_by_60_db(reverberation_s: float) -> None:
    raw = torch.full((2, 120, 128), FLOOR)
    raw[0, 10, 77] = 0.0
    decays = 10 ** (-6 * 0.01 / torch.tensor([reverberation_s, 0.15]))
    power = 10.0 ** ring_on(raw, decays, torch.tensor([0.5, 0.3])).double()
    assert (power[1] < 2e-10).all(), "nothing is heard in another room"
    click, tail = power[0, 10, 77], power[0, 11:, 77]
    assert float(click) == pytest.approx(1, rel=1e-5)
    frames = round(reverberation_s * 100) - 1
    assert float(tail[:frames].sum()) == pytest.approx(0.5, rel=1e-4)
    decay = -6 * (frames - 1) * 0.01 / reverberation_s  # powers of ten
    assert float((tail[frames - 1] / tail[0]).log10()) == pytest.approx(decay, abs=0.01)
    assert (power[0, :10] < 2e-10).all(), "nothing is heard before it happens"
    assert (power[0, :, :77] < 2e-10).all()


@given(st.integers(1, 300), st.floats(0.15, 0.6), st.integers(0, 99))
def test_ringing_on_is_a_filter_of_one_pole(length: int, reverberation_s: float, seed: int) -> None:
    decay = 10 ** (-6 * 0.01 / reverberation_s)
    raw = torch.randn(1, length, 128, generator=torch.Generator().manual_seed(seed))
    power = 10.0 ** raw[0].double().numpy()
    tail = lfilter([0, decay], [1, -decay], power, axis=0) * 0.3 * (1 - decay) / decay
    found = ring_on(raw, torch.tensor([decay]), torch.tensor([0.3]))[0]
    assert relative_error(10.0 ** found.double(), torch.from_numpy(power + tail)) < 64 * EPS


@pytest.mark.parametrize("tempo", [0.85, 1.2])
def test_tempo_moves_a_click_and_its_turn_alike_and_keeps_the_pitch(tempo: float) -> None:
    kept = torch.full((640, 128), -8.0).half()
    kept[320 + 140, 77] = 0.0
    rows = [Row([Piece(0, 320)], 1.0, STILL), Row([Piece(320, 320)], tempo, STILL)]
    frames = powers(frames_of(kept, recipe(rows, 200), 40))[200:]
    assert frames.shape == (200, 128)
    loudest = int(frames.amax(dim=1).argmax())
    assert abs(loudest - 140 / tempo) <= 1
    assert int(frames[loudest].argmax()) == 77
    turn = played(Turn("dog", "Yes.", None, "dog", "night", 1.4, 2.0, 1.5), tempo)
    assert [turn.start_s, turn.end_s, turn.answer_s] == pytest.approx([1.4 / tempo, 2 / tempo, 1.5 / tempo])


def test_over_a_telephone_and_with_bands_blanked_the_rest_is_as_it_was() -> None:
    kept = torch.randn(80, 128, generator=torch.Generator().manual_seed(0)).half()
    moves = [STILL, STILL._replace(narrow=True), STILL._replace(bands=((3, 9), (50, 50)))]
    rows = [Row([Piece(0, 80)], 1.0, move) for move in moves]
    plain, narrow, blanked = powers(frames_of(kept, recipe(rows, 80), 40)).view(3, 80, 128)
    high = torch.from_numpy(centres_hz() > 4000)
    loudest = kept.float().amax()
    assert torch.equal(narrow[:, ~high], plain[:, ~high])
    assert (narrow[:, high] <= loudest - 8 + 16 * EPS).all()
    assert torch.equal(blanked[:, 9:], plain[:, 9:]) and torch.equal(blanked[:, :3], plain[:, :3])
    assert (blanked[:, 3:9] - kept.float().mean()).abs().max() < 16 * EPS


def test_every_second_row_keeps_its_tempo_and_the_others_stay_in_range() -> None:
    rng = np.random.default_rng(0)
    tempos = [draw_tempo(Augment(tempo=0.1), rng) for _ in range(400)]
    assert 150 < tempos.count(1.0) < 250
    assert all(0.9 <= tempo <= 1.1 for tempo in tempos) and len(set(tempos)) > 100
    assert draw_tempo(Augment(), rng) == 1.0


def test_a_share_of_the_rows_is_moved_and_the_others_are_not() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_settings(Augment(gain_db=(-6, 6), warp=0.1, share=0.3), rng) for _ in range(600)]
    moved = [settings for settings in drawn if settings != Augment()]
    assert len(moved) / len(drawn) == pytest.approx(0.3, abs=0.06)
    assert {settings.warp for settings in moved} == {0.1}


def test_nothing_falls_below_the_least_power() -> None:
    softer = STILL._replace(level=np.full(128, -2.0, np.float32))
    frames = frames_of(
        torch.full((80, 128), FLOOR + 1).half(), recipe([Row([Piece(0, 80)], 1.0, softer)], 80), 40
    )
    assert (powers(frames) == FLOOR).all()


def test_everything_at_once_stays_finite_and_every_row_is_moved_by_itself() -> None:
    settings = Augment((-20, 6), warp=0.12, tilt_db=6, mix=0.5, narrow=0.5, mask=0.5, room=0.5, tempo=0.2)
    rng, kept = np.random.default_rng(0), torch.randn(900, 128).half()
    rows = []
    for _ in range(24):
        pieces = [Piece(int(rng.integers(700)), 100, draw_voice(settings, rng)) for _ in range(2)]
        tempo = draw_tempo(settings, rng)
        rows.append(Row(pieces, tempo, draw_move(settings, rng), Piece(600, 90)))
    together = frames_of(kept, recipe(rows, 160), 40)
    assert together.shape == (24 * 4, 40, 128)
    assert torch.isfinite(together).all()
    alone = torch.cat([frames_of(kept, recipe([row], 160), 40) for row in rows])
    assert relative_error(together, alone) < 16 * EPS
