"""Scores of answers about finished clips, with the field's tools; every figure with its 95 % interval.

choice       a choice is right where all its words are in the answer and none of the words that only other
             choices have: the rule of MMAU's own evaluation.py
answer       contains: a right answer stands in the reply, word for word; exact: it is the whole reply; both
             after Whisper's English text normaliser. judged: what a language model says (offline_judge.py)
open         judged: mean of 1 to 5; words: length of the answers
words        word error rate by jiwer after Whisper's English text normaliser, over all words
translation  corpus BLEU by sacrebleu: tokenizer zh into Chinese, 13a into English, case kept
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jiwer
import numpy as np

from .benchmarks import ANSWER, CHOICE, OPEN, TRANSLATION, WORDS, Benchmark, Item
from .statistics import Figure, bootstrap_sums, share

Scores = dict[str, dict[str, Figure]]  # figure -> group -> value
Replied = Sequence[tuple[Item, str]]
ALL = "all"


@functools.cache
def _normaliser() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer  # type: ignore[import-untyped]

    return EnglishTextNormalizer()


def normalise(text: str) -> str:
    """Whisper's English normaliser (arXiv 2212.04356, appendix C): case, punctuation, contractions, numbers,
    British spellings, fillers and what stands in brackets.
    """
    return " ".join(_normaliser()(text).split())


def is_choice(answer: str, reply: str, choices: Sequence[str]) -> bool:
    """Whether a reply names this answer and no other choice, word by word."""
    said, right = _tokens(reply), _tokens(answer)
    wrong = {word for choice in choices if _tokens(choice) != right for word in _tokens(choice) - right}
    return bool(said) and right <= said and not said & wrong


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def contains(references: Sequence[str], reply: str) -> bool:
    """Whether one of the right answers stands in the reply as whole words."""
    said = f" {normalise(reply)} "
    return any(f" {words} " in said for words in map(normalise, references) if words)


def is_exact(references: Sequence[str], reply: str) -> bool:
    return normalise(reply) in {words for words in map(normalise, references) if words}


def score(benchmark: Benchmark, replied: Replied, judged: Mapping[str, float] | None = None) -> Scores:
    """All figures of a set, over all items and over each group. judged: by id, 1 to 5, or 1 where right."""
    found: Scores = {}
    with_answer = [pair for pair in replied if pair[0].references]
    if benchmark.kind == CHOICE:
        right = [float(is_choice(i.references[0], reply, i.choices)) for i, reply in with_answer]
        found["accuracy"] = _shares(with_answer, right)
    elif benchmark.kind == ANSWER:
        found["contains"] = _shares(with_answer, [float(contains(i.references, r)) for i, r in with_answer])
        found["exact"] = _shares(with_answer, [float(is_exact(i.references, r)) for i, r in with_answer])
    elif benchmark.kind == WORDS:
        counts = np.array([_errors(i.references[0], r) for i, r in with_answer]).reshape(-1, 4)
        for k, name in enumerate(("word_error_rate", "substituted", "deleted", "inserted")):
            errors = counts[:, :3].sum(axis=1) if k == 0 else counts[:, k - 1]
            found[name] = _ratios(with_answer, np.column_stack((errors, counts[:, 3])), words=True)
    elif benchmark.kind == TRANSLATION:
        found["bleu"] = _bleu(with_answer, benchmark.target)
    if judged is not None:
        heard = [pair for pair in replied if pair[0].id in judged]
        verdicts = [judged[item.id] for item, _ in heard]
        if benchmark.kind == OPEN:
            found["judged"] = _ratios(heard, np.column_stack((verdicts, np.ones(len(verdicts)))))
        else:
            found["judged"] = _shares(heard, verdicts)
    if benchmark.kind == OPEN:
        lengths = np.array([(len(reply.split()), 1) for _, reply in replied]).reshape(-1, 2)
        found["words"] = _ratios(replied, lengths)
    found["answered"] = _shares(replied, [float(bool(reply.strip())) for _, reply in replied])
    return found


def describe(benchmark: Benchmark) -> str:
    """The tool that scores a set, with its version and options."""
    version = importlib.metadata.version
    if benchmark.kind == TRANSLATION:
        return f"sacrebleu {_scorer(benchmark.target).get_signature()}"
    whisper = f"whisper-normalizer {version('whisper-normalizer')}, English"
    if benchmark.kind == WORDS:
        return f"jiwer {version('jiwer')} after {whisper}"
    others = {CHOICE: "MMAU's string match", ANSWER: f"whole words after {whisper}", OPEN: "length alone"}
    return others[benchmark.kind]


def _groups(replied: Replied) -> dict[str, list[int]]:
    """Name of a group -> places of its items; all first."""
    found: dict[str, list[int]] = {ALL: list(range(len(replied)))}
    named: dict[str, list[int]] = {}
    for place, (item, _) in enumerate(replied):
        for key, value in item.groups.items():
            named.setdefault(f"{key}: {value}", []).append(place)
    return found | dict(sorted(named.items()))


def _shares(replied: Replied, hits: Sequence[float]) -> dict[str, Figure]:
    groups = _groups(replied)
    return {name: share(round(sum(hits[i] for i in own)), len(own)) for name, own in groups.items()}


def _ratios(replied: Replied, rows: np.ndarray, words: bool = False) -> dict[str, Figure]:
    """Sum of the first column over sum of the second, rows [N, 2]; words: n is the second sum."""
    found = {}
    for name, own in _groups(replied).items():
        n = int(rows[own, 1].sum()) if words else len(own)
        found[name] = bootstrap_sums(rows[own], lambda s: s[0] / s[1] if s[1] else math.nan, n)
    return found


def _errors(reference: str, reply: str) -> tuple[int, int, int, int]:
    """Words substituted, deleted, inserted; words of the reference."""
    right = normalise(reference)
    out = jiwer.process_words(right, normalise(reply))
    return out.substitutions, out.deletions, out.insertions, len(right.split())


@functools.cache
def _scorer(target: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize="zh" if target == "zh" else "13a")


def _bleu(replied: Replied, target: str) -> dict[str, Figure]:
    """n-gram counts of each item, which add up to those of the corpus."""
    scorer, rows = _scorer(target), []
    for item, reply in replied:
        out = scorer.corpus_score([reply], [list(item.references)])
        rows.append([*out.counts, *out.totals, out.sys_len, out.ref_len])
    counts = np.array(rows).reshape(-1, 10)

    def bleu(s: np.ndarray) -> float:
        correct, total = [int(x) for x in s[:4]], [int(x) for x in s[4:8]]
        return float(scorer.compute_bleu(correct, total, int(s[8]), int(s[9]), smooth_method="exp").score)

    return {name: bootstrap_sums(counts[own], bleu) for name, own in _groups(replied).items()}
