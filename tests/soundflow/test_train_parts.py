"""What a training step is made of: shards, features, augmentation, sequences, batches, the loss."""

from __future__ import annotations

import io
import json
import math
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastloop import ops
from fastloop.config import small
from fastloop.mel import MelState, mel_chunk
from fastloop.soundflow import features
from fastloop.soundflow.augment import Augment
from fastloop.soundflow.batches import Batches, BatchPlan, Drawn, sound_classes
from fastloop.soundflow.features import clamp, feature_set, raw_log_mel
from fastloop.soundflow.objective import LOSSES, Batch, Objective, Weighting
from fastloop.soundflow.recipe import Recipe
from fastloop.soundflow.sequence import IGNORED, Due, due_chunk, due_replies
from fastloop.soundflow.shards import ShardError, Turn, find_shards, parse_stream, read_streams
from fastloop.soundflow.trainable import Trainable, block_products, causal_products, initial_weights
from fastloop.testing.cases import byte_tokenizer, random_sound
from fastloop.testing.streams import flac, record, two_streams, write_shard
from fastloop.testing.tolerance import relative_error

EPS = torch.finfo(torch.float32).eps


# ---- shards


def test_a_sample_that_cannot_be_used_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    noisy = record("n", turns=[{**record()["turns"][1], "answer_s": None}])
    shard = write_shard(
        tmp_path / "t.tar",
        [
            (record("a"), flac(4)),
            (record("cut"), b"fLaC no"),
            (record("long", 9.0), flac(4)),
            (noisy, flac(4)),
        ],
    )
    skipped: list[str] = []
    found = list(read_streams([shard], "train", skipped.append))
    assert [stream.id for stream, _ in found] == ["a"]
    assert len(skipped) == 3
    for line, words in zip(
        skipped, (["cut", "decoded"], ["long", "9"], ["n", "turns[0]", "answer_s"]), strict=True
    ):
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"turns": "none"}, "turns"),
        ({"split": "test"}, "split"),
        ({"duration_s": -1}, "duration_s"),
        ({"ability": 3}, "ability"),
        ({"turns": record()["turns"][::-1]}, "time order"),
        ({"turns": [{**record()["turns"][1], "assistant": " "}]}, "assistant"),
        ({"turns": [{**record()["turns"][1], "end_s": 0.5}]}, "end_s"),
        ({"turns": [{**record()["turns"][1], "snr_db": "loud"}]}, "snr_db: must be decibels, is 'loud'"),
        ({"turns": [{**record()["turns"][1], "snr_db": math.inf}]}, "snr_db: must be decibels, is inf"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardError, match=words):
        parse_stream(record(**change))


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no \*.tar"):
        find_shards([tmp_path])
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ShardError, match="cannot be read"):
        list(read_streams(find_shards([tmp_path]), None, print))


# ---- features


def test_features_are_what_the_listening_loop_computes() -> None:
    pcm = torch.from_numpy(random_sound(2.0, seed=3))
    state, slot = MelState.empty(1), torch.zeros(1, dtype=torch.int64)
    online = torch.cat([mel_chunk(state, slot, chunk[None], edge="reflect") for chunk in pcm.split(6400)])
    offline = clamp(raw_log_mel(pcm, 6400))
    assert relative_error(offline, online) < 400 * EPS  # a sum of 400 terms, and a logarithm


def test_features_are_computed_once_and_kept_per_set_of_shards(tmp_path: Path) -> None:
    shard = two_streams(tmp_path)
    first = feature_set([shard], "train", 40, tmp_path / "cache", print)
    again = feature_set([shard], "train", 40, tmp_path / "cache", print)
    assert [stream.id for stream in first.streams] == ["a", "b"]
    assert first.streams == again.streams
    assert [again.chunks(i) for i in (0, 1)] == [10, 14]  # 4 s, and 5.3 s filled up to whole chunks
    with pytest.raises(ShardError, match="val"):
        feature_set([shard], "val", 40, tmp_path / "cache", print)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and nothing half made is left


def test_features_made_by_several_processes_are_the_same(tmp_path: Path) -> None:
    """In the order of the shards, whoever is ready first; and what is left out is told in that order."""
    shards, told, alone = [], list[str](), list[str]()
    for number, seconds in enumerate((9.0, 5.3, 4.1)):
        (tmp_path / f"{number}").mkdir()
        shards.append(two_streams(tmp_path / f"{number}", seconds=seconds))
    for number in (0, 2):
        with tarfile.open(shards[number], "a") as tar:
            tar.addfile(tarfile.TarInfo(f"broken{number}.json"))
    here = feature_set(shards, "train", 40, tmp_path / "here", alone.append)
    there = feature_set(shards, "train", 40, tmp_path / "there", told.append, workers=2)
    assert (here.streams, here.places) == (there.streams, there.places)
    np.testing.assert_array_equal(here.frames, there.frames)
    assert told == alone and ["broken0" in told[0], "broken2" in told[1]] == [True, True]


def test_features_that_another_process_made_meanwhile_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, cache = two_streams(tmp_path), tmp_path / "cache"
    expected = feature_set([shard], "train", 40, tmp_path / "other", print)
    write = features._write

    def overtaken(partial: Path, *arguments: Any) -> None:
        write(partial, *arguments)
        shutil.copytree(partial, cache / partial.name[1:].split(".")[0])

    monkeypatch.setattr(features, "_write", overtaken)
    found = feature_set([shard], "train", 40, cache, print)
    assert torch.equal(found.kept, expected.kept)
    assert len(list(cache.iterdir())) == 1, "nothing half made is left"


def test_why_no_stream_can_be_used_is_said(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name in ("a", "b"):
            data = json.dumps(record(name, split="holiday")).encode()
            info = tarfile.TarInfo(f"{name}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    told: list[str] = []
    with pytest.raises(
        ShardError, match=r"in .*x\.tar: 2 could not be used, the first: x\.tar/a: split: must"
    ):
        feature_set([shard], "train", 40, tmp_path / "cache", told.append)
    assert len(told) == 2


# ---- attention


@pytest.mark.parametrize("length", [1, 128, 129, 300])
def test_attention_by_products_is_attention(length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def random(heads: int) -> torch.Tensor:
        x = torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    q, k, v = random(6), random(2), random(2)
    upstream = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((causal_products(q, k, v) * upstream).sum(), (q, k, v))
    reference = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad((reference * upstream).sum(), (q, k, v))
    assert relative_error(causal_products(q, k, v).detach(), reference.detach()) < 1e-14
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-13


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 3), st.integers(0, 99))
def test_products_in_blocks_are_the_op(blocks: int, positions: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, positions, 3 * heads * 16)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(blocks, positions, heads * 16, generator=generator, dtype=torch.float64)
    found, expected = block_products(qkv, heads), ops.block_attention_ref(qkv, heads)
    assert relative_error(found.detach(), expected.detach()) < 1e-14
    slopes = (torch.autograd.grad((out * upstream).sum(), qkv)[0] for out in (found, expected))
    assert relative_error(*slopes) < 1e-13


# ---- sequences


@given(st.floats(0, 1000, allow_nan=False))
def test_an_answer_is_due_in_the_first_chunk_that_ends_after_it(answer_s: float) -> None:
    chunk = due_chunk(answer_s, 0.4)
    assert (chunk + 1) * 0.4 >= answer_s - 1e-6
    assert chunk == 0 or chunk * 0.4 < answer_s + 1e-6


def _turn(answer_s: float, reply: str, emotion: str | None = None) -> Turn:
    return Turn("", reply, emotion, "x", "", 0.0, answer_s, answer_s)


def test_replies_that_fall_due_together_are_joined_or_wait() -> None:
    digits = [_turn(1.0, "1"), _turn(1.1, "2"), _turn(1.3, "3")]
    found = due_replies(digits, 10, 0.4)
    assert {chunk: reply.text for chunk, reply in found.items()} == {2: "1 2", 3: "3"}
    alarms = [
        _turn(1.0, "1"),
        _turn(1.1, "Alarm!", "urgent"),
        _turn(1.15, "Siren!", "urgent"),
        _turn(3.99, "x"),
    ]
    found = due_replies(alarms, 9, 0.4)
    assert {chunk: reply.text for chunk, reply in found.items()} == {2: "1", 3: "Alarm!", 4: "Siren!"}


# ---- batches and the loss


def make_batches(directory: Path, seed: int = 0, **options: Any) -> Batches:
    """Batches of two streams; what is to be said in the second one is a digit."""
    features = feature_set([two_streams(directory)], "train", 40, directory / "cache", print)
    one, (bed, siren) = features.streams[0], features.streams[1].turns
    digit = replace(siren, reply="4", emotion=None)
    features = replace(features, streams=(one, replace(features.streams[1], turns=(bed, digit))))
    plan = BatchPlan(chunks=24, rows_s=(4.8,), **options)
    classes = sound_classes(features.streams, rare=1)
    settings = Augment(gain_db=(-10, 0), mix=0.5)
    config = small()
    return Batches(config, byte_tokenizer(config.decoder.vocab), features, classes, seed=seed, plan=plan,
                   augment=settings, prompts=("other",))  # fmt: skip


def test_a_batch_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    batches = make_batches(tmp_path)
    seventh = batches[7]
    _ = batches[3]
    for one, other in zip(seventh, batches[7], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(seventh.frames, batches[8].frames)
    assert not torch.equal(seventh.frames, make_batches(tmp_path, seed=1)[7].frames)


def test_a_batch_holds_what_the_protocol_says(tmp_path: Path) -> None:
    batches, config = make_batches(tmp_path), small()
    batch = batches[4]
    t = config.tokens
    assert batch.frames.shape == (24, 40, 128)
    assert int(batch.audio.sum()) == 24 * config.chunk_tokens
    assert torch.equal(batch.audio, batch.ids == t.audio_pad)
    decides = batch.ids[:, :-1] == t.assistant
    assert int(decides.sum()) == 24
    assert set(batch.labels[:, 1:][decides].tolist()) <= {t.keep_silence, t.text_begin, IGNORED}
    assert (batch.due == Due.DIGITS).any()
    assert set(batch.labels[batch.due != Due.NOTHING].tolist()) <= {t.text_begin, IGNORED}
    assert (batch.labels[batch.audio] == IGNORED).all()
    assert batch.active.shape == (24, config.chunk_tokens, len(batches.classes))
    siren_s = float(batch.active[..., batches.classes["siren"]].sum()) * 0.04
    assert 0.9 <= siren_s <= 6  # a second of each stream in the rows; rows may cut one


def test_a_recipe_takes_few_bytes_of_what_it_makes(tmp_path: Path) -> None:
    """It is what goes from process to process and to a GPU."""
    batches = make_batches(tmp_path)
    told = batches.draw(4)
    assert isinstance(told.frames, Recipe)
    size = sum(tensor.nbytes for tensor in told.frames) - told.frames.warps.nbytes
    assert size < batches[4].frames.nbytes / 25
    sent = Drawn.unpacked(told.packed().to(torch.device("cpu")), told.chunk_frames)
    for one, other in zip((*sent.frames, *sent.rest), (*told.frames, *told.rest), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(sent.made_of(batches.features.kept).frames, batches[4].frames)


def test_rows_filled_up_to_a_multiple_are_the_same_in_front(tmp_path: Path) -> None:
    batches = make_batches(tmp_path)
    plain = batches[4]
    batches.multiple = 64
    filled, length = batches[4], plain.ids.shape[1]
    assert filled.ids.shape[1] % 64 == 0 and 0 < filled.ids.shape[1] - length < 64
    for name in ("ids", "labels", "audio", "due"):
        assert torch.equal(getattr(filled, name)[:, :length], getattr(plain, name)), name
    assert (filled.labels[:, length:] == IGNORED).all() and not filled.audio[:, length:].any()


def test_the_loss_is_its_definition_word_for_word(tmp_path: Path) -> None:
    config, batches = small(), make_batches(tmp_path)

    def found(batch: Batch, kind: Due) -> torch.Tensor:
        return ((batch.due == kind) & (batch.labels != IGNORED)).nonzero()

    wanted = {Due.DIGITS: 2, Due.ALERT: 1}
    drawn = (batches[number] for number in range(99))
    batch = next(b for b in drawn if all(len(found(b, kind)) >= n for kind, n in wanted.items()))
    due = batch.due.clone()
    due[tuple(found(batch, Due.DIGITS)[0])] = Due.ANSWER  # as if it answered a question
    batch = batch._replace(due=due)
    model = Trainable(config, initial_weights(config, 0), classes=1)
    weighting = Weighting(
        text_weight=0.5, control_weight=2.0, silence_weight=3.0, digits_weight=1.7, alerts_weight=1.3
    )
    total, control, text, *_ = Objective(model, weighting)(batch).tolist()
    encoder, decoder = model.stages()
    t = config.tokens
    tokens = encoder.encode(batch.frames).reshape(-1, config.decoder.width)
    x, used = decoder.embed(batch.ids.flatten()).view(*batch.ids.shape, -1).clone(), 0
    controls, costs, texts = [], [], []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            if batch.audio[b, i]:
                x[b, i], used = tokens[used], used + 1
        logits = decoder.logits(decoder.sequence(x[b : b + 1])[0])
        for i in range(1, x.shape[1]):
            label = int(batch.labels[b, i])
            if label == IGNORED:
                continue
            if batch.ids[b, i - 1] == t.assistant:
                pair = logits[i - 1, [t.keep_silence, t.text_begin]]
                missed = {Due.DIGITS: 1.7, Due.ALERT: 1.3}.get(Due(int(batch.due[b, i])), 1.0)
                cost = 3.0 if label == t.keep_silence else missed
                costs.append(cost)
                controls.append(-cost * F.log_softmax(pair, 0)[int(label == t.text_begin)])
            else:
                texts.append(-F.log_softmax(logits[i - 1], 0)[label])
    assert used == len(tokens)
    assert {3.0, 1.7, 1.3, 1.0} == set(costs)
    means = [torch.stack(controls).sum().item() / sum(costs), torch.stack(texts).mean().item()]
    bound = 1e3 * EPS  # two layers of float32 products of width 64, in another order
    assert abs(control - means[0]) < bound * means[0]
    assert abs(text - means[1]) < bound * means[1]
    assert abs(total - (2 * means[0] + 0.5 * means[1])) < bound * total


def test_what_is_recalled_is_told_at_the_end_of_every_chunk_from_halfway(tmp_path: Path) -> None:
    config, batch = small(), make_batches(tmp_path)[4]
    model = Trainable(config, initial_weights(config, 0), classes=batch.past.shape[-1])
    torch.nn.init.normal_(model.recalled.weight, generator=torch.Generator().manual_seed(0))
    loss = Objective(model, Weighting(recalled_weight=1.0))
    assert loss(batch)[LOSSES.index("recalled")] > 0
    with ops.use_backend("reference"):
        encoder, decoder = model.stages()
        x = decoder.embed(batch.ids.flatten()).view(*batch.ids.shape, -1).clone()
        x[batch.audio] = encoder.encode(batch.frames).flatten(0, 1)
        half = decoder._sequence_layer(x, "decoder.layers.0.", torch.arange(x.shape[1]))
    assert config.decoder.layers == 2
    ends = torch.cat([half[b, torch.nonzero(row)[:, 0]].unflatten(0, (-1, config.chunk_tokens))[:, -1]
                      for b, row in enumerate(batch.audio)])  # fmt: skip
    logits = model.recalled(F.rms_norm(ends, ends.shape[-1:]))
    towards = torch.where(batch.past.flatten(1), logits, -logits).double()
    wanted = -F.logsigmoid(towards).sum().item() / len(ends)
    assert abs(loss(batch)[LOSSES.index("recalled")].item() - wanted) < 1e3 * EPS * wanted


def test_every_probe_counts_as_much_as_its_weight_says(tmp_path: Path) -> None:
    batch = make_batches(tmp_path)[4]
    model = Trainable(small(), initial_weights(small(), 0), classes=batch.past.shape[-1])
    only = {"text_weight": 0.0, "control_weight": 0.0}
    for weights in (
        {"probe_weight": 0.7},
        {"recalled_weight": 0.3},
        {"probe_weight": 0.7, "recalled_weight": 0.3},
    ):
        found = dict(zip(LOSSES, Objective(model, Weighting(**only, **weights))(batch).tolist(), strict=True))
        expected = weights.get("probe_weight", 0) * (found["heard"] + found["recognised"])
        expected += weights.get("recalled_weight", 0) * found["recalled"]
        assert found["total"] == pytest.approx(expected, rel=8 * EPS)
        assert expected > 0


def test_the_keys_of_the_encoder_never_get_a_bias(tmp_path: Path) -> None:
    config, batch = small(), make_batches(tmp_path)[4]
    objective = Objective(
        Trainable(config, initial_weights(config, 0), classes=1), Weighting(probe_weight=1.0)
    )
    objective(batch)[0].backward()
    width = config.encoder.width
    gradient = objective.model.root.get_parameter("encoder.layers.0.qkv.bias").grad
    assert gradient is not None
    q, k, v = gradient.split(width)
    assert not k.any()
    assert q.any()
    assert v.any()
