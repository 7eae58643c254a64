"""The lines of `fastloop listen --json`, checked key by key: for tests of whatever prints them."""

from __future__ import annotations

import json
from typing import Any

NUMBER = (int, float)
SHAPES: dict[str, dict[str, Any]] = {
    "decision": {"chunk": int, "t": NUMBER, "decision": str, "p_respond": NUMBER},
    "response.start": {"t": NUMBER, "emotion": (str, type(None))},
    "response.text": {"t": NUMBER, "text": str},
    "response.end": {"t": NUMBER, "text": str, "reason": str},
    "summary": {
        "file": str,
        "audio_s": NUMBER,
        "wall_s": NUMBER,
        "chunks": int,
        "responses": int,
        "latency_ms": dict,
    },
}
CHOICES = {"decision": {"silent", "respond"}, "reason": {"end", "length", "interrupt"}}


def parse(output: str) -> list[dict[str, Any]]:
    """Every line of an output; each must have exactly the documented shape."""
    assert output.isascii() and (not output or output.endswith("\n"))
    return [_check(json.loads(line)) for line in output.splitlines()]


def _check(record: dict[str, Any]) -> dict[str, Any]:
    shape = SHAPES[record["type"]]
    assert list(record) == ["type", *shape], record
    for key, kind in shape.items():
        assert isinstance(record[key], kind) and not isinstance(record[key], bool), record
        assert key not in CHOICES or record[key] in CHOICES[key], record
    if record["type"] == "decision":
        assert 0 <= record["p_respond"] <= 1 and record["p_respond"] == round(record["p_respond"], 6)
    if "t" in record:
        assert record["t"] == round(record["t"], 3)
    if record["type"] == "summary":
        assert list(record["latency_ms"]) == ["p50", "p99", "max"]
        values = list(record["latency_ms"].values())
        assert values == [None] * 3 or 0 < values[0] <= values[1] <= values[2], record
    return record


def responses(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each response as {"t", "emotion", "text", "reason"}; its pieces must add up to its text."""
    found: list[dict[str, Any]] = []
    said: str | None = None
    for record in records:
        kind = record["type"]
        if kind == "response.start":
            assert said is None
            found.append({"t": record["t"], "emotion": record["emotion"]})
            said = ""
        elif kind == "response.text":
            assert said is not None and record["text"]
            said += record["text"]
        elif kind == "response.end":
            assert said == record["text"]
            found[-1] |= {"text": record["text"], "reason": record["reason"]}
            said = None
    assert said is None
    return found
