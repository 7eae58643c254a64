"""A language model as the judge of answers: how good is an open answer (1 to 5), is an answer right?

What VoiceBench asks its judge, in our own words, greedy and once per answer. Only a number from 1 to 5, or
yes or no, is taken for a verdict; anything else is asked for again, and in the end listed as not judged.
An empty answer is not sent: it is worth 1, and wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from .benchmarks import OPEN, Item
from .clips import DataError
from .llm import Endpoint, Unusable

SIDE_BY_SIDE = 8  # requests under way at once
RATE = """A voice assistant was told something, and answered. Rate the answer from 1 to 5:
1: it is beside the point, or wrong, or no answer at all.
2: it has to do with what was said, but is largely wrong or leaves out most of it.
3: it is mostly right, but too long, or with things that do not belong there.
4: it is right and to the point.
5: it is right, complete and as short as can be: nothing could be better.

What was said: {prompt}
The answer: {reply}

Reply with the number alone."""
CHECK = """Is an answer right? It is right where it gives one of the right answers, in whatever words.

Question: {prompt}
Right answers: {references}
Answer to check: {reply}

Reply with yes or no alone."""


def parse_rating(content: str) -> float:
    """The one number from 1 to 5 in a verdict; DataError where there is none, or more."""
    found = set(re.findall(r"-?\d+(?:\.\d+)?", content))
    if len(found) != 1 or not found <= set("12345"):
        raise DataError("the verdict must be one whole number from 1 to 5")
    return float(found.pop())


def parse_check(content: str) -> float:
    """1 for yes, 0 for no; DataError for anything else."""
    word = content.strip().strip(".!*\"'").lower()
    if word not in ("yes", "no"):
        raise DataError("the verdict must be yes or no")
    return float(word == "yes")


def judge(
    endpoint: Endpoint,
    kind: str,
    replied: Sequence[tuple[Item, str]],
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, float], list[str]]:
    """(verdicts by id, a line for each answer without one). DataError where the endpoint fails."""
    verdicts: dict[str, float] = {}
    missing: list[str] = []

    def verdict(pair: tuple[Item, str]) -> float | Unusable:
        try:
            return _verdict(endpoint, kind, *pair)
        except Unusable as error:
            return error

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        try:
            for done, (pair, found) in enumerate(zip(replied, pool.map(verdict, replied), strict=True), 1):
                if isinstance(found, Unusable):
                    missing.append(f"{pair[0].id}: {found}")
                else:
                    verdicts[pair[0].id] = found
                progress(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return verdicts, missing


def _verdict(endpoint: Endpoint, kind: str, item: Item, reply: str) -> float:
    rates = kind == OPEN
    if not reply.strip():
        return 1.0 if rates else 0.0
    if rates:
        text = RATE.format(prompt=item.prompt, reply=reply)
        return endpoint.validated(text, parse_rating, "Reply with the number alone.")
    references = "; ".join(item.references)
    text = CHECK.format(prompt=item.prompt, references=references, reply=reply)
    return endpoint.validated(text, parse_check, "Reply with yes or no alone.")
