"""Language models at any endpoint with OpenAI's chat completions interface; and a planner that asks one.

The planner gives the scenario's grammar in the prompt, and the answer is validated against it: only its
events, pauses and numbers that are plausible. What is wrong is told to the model, which may try again. With
`kept`, a folder, a corpus can be built again to the byte without the endpoint. The judge of the offline
benchmarks (offline_judge.py) asks the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .abilities import SubTask
from .clips import DataError
from .grammar import Scenario, Weights
from .planner import NOMINAL_S, GrammarPlanner, Outline, with_script
from .scripts import Beat
from .synth import Rng

KEY_VARIABLE = "FASTLOOP_LLM_KEY"  # the environment variable with the endpoint's key, if it wants one
TRIES = 3
LONGEST_GAP_S = 60.0
LARGEST_ANSWER = 1 << 20  # bytes

T = TypeVar("T")

PROMPT = """You plan what is heard in a stream of {seconds:.0f} seconds in this scene: {scene}.
In the background: {beds}. The stream is made for: {how}.
Choose {least} to {most} events in a believable order. Use only these, the number says how likely one is:
{events}
After some events others get likelier: {follows}.
Answer with JSON alone: {{"events": [{{"label": "...", "gap_s": 3.5}}, ...]}} where gap_s is the pause in
seconds since the event before ended (0.5 to 15)."""


class Unusable(DataError):
    """A model answered, and none of its answers was of the form that was asked for."""


@dataclass(frozen=True)
class Endpoint:
    """A language model at an address: url as .../v1. With `kept`, a folder, each answer is stored under the
    hash of its request, and the same request is never sent twice.
    """

    url: str
    model: str
    kept: Path | None = None
    temperature: float = 0.8
    timeout_s: float = 60.0

    def ask(self, messages: Sequence[Mapping[str, str]], **more: Any) -> str:
        """The content of the answer to a conversation; `more` goes into the request, such as seed.

        DataError where the endpoint cannot be reached or answers no chat completion.
        """
        body = {"model": self.model, "temperature": self.temperature, "messages": list(messages), **more}
        data = json.dumps(body, sort_keys=True).encode()
        file = self.kept / f"{hashlib.sha256(data).hexdigest()[:32]}.json" if self.kept else None
        if file is not None and file.exists():
            return str(json.loads(file.read_text(encoding="utf-8"))["content"])
        content = self._send(data)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
            part.write_text(json.dumps({"request": body, "content": content}, indent=1), encoding="utf-8")
            part.replace(file)
        return content

    def validated(self, text: str, parse: Callable[[str], T], again: str, **more: Any) -> T:
        """parse(answer to `text`). A DataError of `parse` is told to the model with `again`, and it may try
        again; Unusable after TRIES answers.
        """
        messages = [{"role": "user", "content": text}]
        why = ""
        for _ in range(TRIES):
            content = self.ask(messages, **more)
            try:
                return parse(content)
            except DataError as error:
                why = str(error)
                messages = [
                    *messages,
                    {"role": "assistant", "content": content},
                    {"role": "user", "content": f"That is not right: {why}. {again}"},
                ]
        raise Unusable(f"{self.url}: model {self.model!r} gave no usable answer in {TRIES} tries: {why}")

    def _send(self, data: bytes) -> str:
        address = f"{self.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        if not address.startswith(("http://", "https://")):
            raise DataError(f"{self.url!r} is no address of an endpoint; one looks like http://host:8000/v1")
        try:
            sent = urllib.request.Request(address, data, headers)
            with urllib.request.urlopen(sent, timeout=self.timeout_s) as answer:
                raw = answer.read(LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise DataError(f"{address} answered {error.code}: {said}") from error
        except OSError as error:  # URLError, timeouts, resets
            raise DataError(f"{address} cannot be reached: {error}; is the server running?") from error
        try:
            content = json.loads(raw)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{address} answered no chat completion: {raw[:200]!r}") from error
        if not isinstance(content, str):
            raise DataError(f"{address}: the content of the answer is {content!r}, not text")
        return content


@dataclass(frozen=True)
class LlmPlanner:
    """grammar: draws scene, beds and what passes, and validates; url: as .../v1; seed and temperature are
    sent along, and most servers heed them.
    """

    grammar: GrammarPlanner
    url: str
    model: str
    kept: Path | None = None
    temperature: float = 0.8
    timeout_s: float = 60.0

    def outline(self, rng: Rng, task: SubTask, seconds: float | None = None) -> Outline:
        """DataError where the endpoint fails, or still answers against the grammar after TRIES tries."""
        scenario, frame = self.grammar.frame(rng, task, seconds)
        seed = int(rng.integers(1 << 31))
        allowed = self.grammar.possible(scenario.events, task.families)
        beats = self._beats(scenario, frame, task, allowed, seed) if allowed else []
        return with_script(rng, frame, beats, task, self.grammar.library)

    def _beats(
        self, scenario: Scenario, frame: Outline, task: SubTask, allowed: Weights, seed: int
    ) -> list[Beat]:
        least, most = (round(n * frame.seconds / NOMINAL_S) for n in task.events)
        text = PROMPT.format(
            seconds=frame.seconds,
            scene=scenario.scene,
            beds=", ".join(frame.beds),
            how=task.how,
            least=least,
            most=most,
            events=json.dumps({label: round(weight, 2) for label, weight in allowed.items()}),
            follows=json.dumps({k: dict(v) for k, v in scenario.follows.items()}),
        )
        endpoint = Endpoint(self.url, self.model, self.kept, self.temperature, self.timeout_s)
        return endpoint.validated(
            text, lambda content: parse_beats(content, allowed, most), "Answer again, JSON alone.", seed=seed
        )


def parse_beats(content: str, allowed: Weights, most: int) -> list[Beat]:
    """The events in a model's answer; DataError says what is against the grammar."""
    inner = content[content.find("{") : content.rfind("}") + 1]  # models wrap JSON in words and fences
    try:
        rows = json.loads(inner)["events"]
    except (ValueError, LookupError, TypeError):
        raise DataError('the answer is not JSON of the form {"events": [...]}') from None
    if not isinstance(rows, list) or len(rows) > most:
        raise DataError(f"events must be a list of at most {most}")
    beats: list[Beat] = []
    for row in rows:
        label = row.get("label") if isinstance(row, dict) else None
        if label not in allowed:
            raise DataError(f"{label!r} is none of the events of this scene")
        gap = row.get("gap_s")
        if isinstance(gap, bool) or not isinstance(gap, (int, float)) or not 0 <= gap <= LONGEST_GAP_S:
            raise DataError(f"gap_s of {label} is {gap!r}, not a number of seconds from 0.5 to 15")
        beats.append(Beat(str(label), float(gap)))
    return beats
