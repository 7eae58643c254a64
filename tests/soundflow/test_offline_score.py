"""Scores of answers against cases counted by hand and against the tools themselves; the judge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jiwer
import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from fastloop.soundflow.benchmarks import ANSWER, BENCHMARKS, OPEN, Item
from fastloop.soundflow.clips import DataError
from fastloop.soundflow.llm import Endpoint
from fastloop.soundflow.offline_judge import judge, parse_check, parse_rating
from fastloop.soundflow.offline_score import contains, describe, is_choice, is_exact, normalise, score
from fastloop.soundflow.statistics import bootstrap, bootstrap_sums

if TYPE_CHECKING:
    Server = Any  # conftest.Endpoint: a server that answers from a list


def item(name: str, *references: str, **fields: Any) -> Item:
    return Item(name, Path("x.wav"), fields.pop("prompt", "?"), references, **fields)


# ---- choices


CHOICES = ("A man", "A woman", "An adult man", "Rain")


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("A man", "It is a man.", True),
        ("A man", "a MAN", True),
        ("A man", "A man or a woman", False),  # a word that only another choice has
        ("A man", "an adult man", False),
        ("A man", "man", False),  # a word of the answer is missing
        ("A man", "", False),
        ("A man", "a human", False),
        ("An adult man", "an adult man", True),
        ("An adult man", "That is an adult: a man!", False),  # "a" stands in other choices only
        ("Rain", "Rain, I think", True),
    ],
)
def test_a_choice_is_right_by_its_words_and_no_others(answer: str, reply: str, right: bool) -> None:
    assert is_choice(answer, reply, CHOICES) == right


def test_mmau_is_counted_by_task_and_difficulty() -> None:
    replied = [
        (item("a", "Rain", choices=CHOICES, groups={"task": "sound", "difficulty": "easy"}), "rain"),
        (item("b", "Rain", choices=CHOICES, groups={"task": "sound", "difficulty": "hard"}), "a man"),
        (item("c", "A man", choices=CHOICES, groups={"task": "speech", "difficulty": "easy"}), ""),
        (item("d", choices=CHOICES, groups={"task": "speech"}), "rain"),  # its answer is not published
    ]
    scores = score(BENCHMARKS["mmau"], replied)
    found = {name: (figure.value, figure.n) for name, figure in scores["accuracy"].items()}
    assert found == {
        "all": (1 / 3, 3),
        "difficulty: easy": (1 / 2, 2),
        "difficulty: hard": (0, 1),
        "task: sound": (1 / 2, 2),
        "task: speech": (0, 1),
    }
    assert scores["answered"]["all"].value == 3 / 4
    unpublished = score(BENCHMARKS["mmau"], replied[3:])
    assert unpublished["accuracy"]["all"].n == 0


# ---- questions


def test_the_normaliser_is_whispers_own() -> None:
    whisper = pytest.importorskip("whisper.normalizers").EnglishTextNormalizer()
    for text in (
        "MISTER BROWN'S COLOUR, he's 12!",
        "I -- uh -- won't pay twenty-five dollars [laughs].",
        "Dr. Who (1963) centre",
        "",
    ):
        assert normalise(text) == " ".join(whisper(text).split())


@pytest.mark.parametrize(
    ("references", "reply", "held", "exact"),
    [
        (("Paris",), "It's Paris, of course.", True, False),
        (("Paris",), "paris.", True, True),
        (("Paris",), "Parisian food", False, False),
        (("Euro", "Peseta"), "The peseta.", True, False),
        (("seven",), "7", True, True),
        (("San Francisco",), "Francisco San", False, False),
        (("?",), "anything", False, False),  # nothing of it is left to be found
        (("Paris",), "", False, False),
    ],
)
def test_an_answer_stands_in_the_reply_as_whole_words(
    references: tuple[str, ...], reply: str, held: bool, exact: bool
) -> None:
    assert contains(references, reply) == held
    assert is_exact(references, reply) == exact
    figures = score(BENCHMARKS["llama-questions"], [(item("a", *references), reply)])
    assert figures["contains"]["all"].value == held
    assert figures["exact"]["all"].value == exact


# ---- words


def test_the_word_error_rate_is_what_a_hand_counts() -> None:
    clean, other = {"split": "test-clean"}, {"split": "test-other"}
    replied = [
        (item("a", "HE HOPED FOR STEW", groups=clean), "He hoped for a stew!"),  # one inserted
        (item("b", "MISTER BROWN", groups=clean), "Mr. Braun"),  # one substituted
        (item("c", "GOOD DAY TO YOU", groups=other), ""),  # four deleted
    ]
    scores = score(BENCHMARKS["librispeech"], replied)
    rates = {name: figure.value for name, figure in scores["word_error_rate"].items()}
    assert rates == {"all": 6 / 10, "split: test-clean": 2 / 6, "split: test-other": 1.0}
    assert scores["word_error_rate"]["split: test-clean"].n == 6  # words
    kinds = {name: scores[name]["all"].value for name in ("substituted", "deleted", "inserted")}
    assert kinds == {"substituted": 0.1, "deleted": 0.4, "inserted": 0.1}
    whole = jiwer.wer([normalise(i.references[0]) for i, _ in replied], [normalise(r) for _, r in replied])
    assert rates["all"] == pytest.approx(whole)


def test_no_words_at_all_are_no_figure() -> None:
    figure = score(BENCHMARKS["librispeech"], [(item("a", "[noise]"), "what")])["word_error_rate"]["all"]
    assert math.isnan(figure.value)


# ---- translations


@pytest.mark.parametrize("name", ["covost2-en-zh", "covost2-zh-en"])
def test_bleu_is_sacrebleus_over_the_corpus(name: str) -> None:
    chinese = [("他说了两次是。", "他说两次是。"), ("两只猫。", "两只狗。"), ("今天天气好。", "今天天气坏。")]
    english = [
        ("The cat sat on it.", "A cat sat on it."),
        ("Two ran.", ""),
        ("It's 3.5.", "It's 3.5."),
    ]
    pairs = chinese if name.endswith("zh") else english
    replied = [(item(str(i), right), said) for i, (right, said) in enumerate(pairs)]
    tool = BLEU(tokenize="zh" if name.endswith("zh") else "13a")
    wanted = tool.corpus_score([said for _, said in pairs], [[right for right, _ in pairs]]).score
    found = score(BENCHMARKS[name], replied)["bleu"]["all"]
    assert 0 < wanted < 100
    assert found.value == pytest.approx(wanted, abs=1e-9)
    assert found.low <= found.value <= found.high
    assert describe(BENCHMARKS[name]) == f"sacrebleu {tool.get_signature()}"


def test_the_bootstrap_of_sums_agrees_with_that_of_items() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(5, 30, 300)
    rows = np.column_stack((rng.binomial(words, 0.2), words))

    def rate(sums: np.ndarray) -> float:
        return float(sums[0] / sums[1])

    fast = bootstrap_sums(rows, rate)
    slow = bootstrap(list(rows), lambda items: rate(np.sum(items, axis=0)), seed=1)
    assert fast.value == slow.value
    width = slow.high - slow.low  # ends of 1000 draws are off by some percent of it
    assert abs(fast.low - slow.low) < 0.15 * width
    assert abs(fast.high - slow.high) < 0.15 * width
    assert bootstrap_sums(rows[:0], rate).n == 0


# ---- the judge


@pytest.mark.parametrize("content", ["4", " 4.", "[[4]]", "Rating: 4", "4\n"])
def test_a_rating_is_one_number(content: str) -> None:
    assert parse_rating(content) == 4.0


@pytest.mark.parametrize("content", ["", "good", "0", "6", "4.5", "4 of 5", "-4", "10"])
def test_what_is_no_rating_is_refused(content: str) -> None:
    with pytest.raises(DataError, match="one whole number from 1 to 5"):
        parse_rating(content)


def test_a_check_is_yes_or_no() -> None:
    assert [parse_check(c) for c in ("Yes", "no.", "**yes**")] == [1.0, 0.0, 1.0]
    with pytest.raises(DataError, match="yes or no"):
        parse_check("Yes, it is right")


def test_the_judge_is_asked_once_and_an_empty_answer_is_not_sent(endpoint: Server, tmp_path: Path) -> None:
    asked = Endpoint(endpoint.url, "m", tmp_path / "kept", temperature=0.0)
    endpoint.answers = ["5"]
    replied = [(item("a", prompt="Say hi."), "Hi!"), (item("b"), "  ")]
    for _ in range(2):  # the second time from the folder
        assert judge(asked, OPEN, replied) == ({"a": 5.0, "b": 1.0}, [])
    assert len(endpoint.asked) == 1
    request = endpoint.asked[0]
    assert request["temperature"] == 0.0
    assert "Say hi." in str(request["messages"])
    assert score(BENCHMARKS["alpaca-eval"], replied, {"a": 5.0, "b": 1.0})["judged"]["all"].value == 3.0


def test_a_verdict_of_another_form_is_asked_for_again_and_then_listed(endpoint: Server) -> None:
    endpoint.answers = ["It is fine.", "yes"]
    asked, replied = Endpoint(endpoint.url, "m"), [(item("a", "x", "y"), "x")]
    assert judge(asked, ANSWER, replied) == ({"a": 1.0}, [])
    assert "x; y" in str(endpoint.asked[0]["messages"])
    assert "yes or no" in str(endpoint.asked[1]["messages"])
    endpoint.answers = ["hm"] * 3
    verdicts, missing = judge(asked, ANSWER, replied)
    assert verdicts == {}
    assert len(missing) == 1
    assert missing[0].startswith("a: ")
    assert score(BENCHMARKS["sd-qa"], replied, verdicts)["judged"]["all"].n == 0


def test_an_endpoint_that_fails_is_an_error(endpoint: Server) -> None:
    endpoint.status = 500
    with pytest.raises(DataError, match="answered 500"):
        judge(Endpoint(endpoint.url, "m"), OPEN, [(item(str(i)), "x") for i in range(20)])
