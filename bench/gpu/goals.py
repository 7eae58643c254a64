"""What must hold on an H200 at the 3B dims, beside what a run measured. Needs the standard library alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Sections = dict[str, Any]
Found = float | None


@dataclass(frozen=True)
class Goal:
    """Measured by `of`, None where the run has it not; met at `limit` or below, or above if `at_least`."""

    name: str
    limit: float
    unit: str
    of: Callable[[Sections], Found]
    at_least: bool = False

    def verdict(self, sections: Sections) -> dict[str, Any]:
        """Plain data; met: None where it was not measured."""
        value = self.of(sections)
        met = None if value is None else value >= self.limit if self.at_least else value <= self.limit
        return {"goal": self.name, "limit": self.limit, "unit": self.unit, "measured": value, "met": met}


def _lines(sections: Sections, section: str, name: str) -> Iterator[dict[str, Any]]:
    for line in sections.get(section, {}).get("lines", []):
        if line["name"] == name and line["variant"].split(",")[0] in ("ours", "triton", "cuda"):
            yield line


def _least(values: Iterable[Found]) -> Found:
    return min((v for v in values if v is not None), default=None)


def _ms(section: str, name: str, precision: str = "") -> Callable[[Sections], Found]:
    """The best median of ours, milliseconds; precision: of the weights, which the variant names."""

    def of(sections: Sections) -> Found:
        found = _lines(sections, section, name)
        return _least(x["median_us"] / 1e3 for x in found if _precision(x["variant"]) == precision)

    return of


def _precision(variant: str) -> str:
    parts = variant.split(", ")[1:]
    return next((part for part in parts if part in ("fp8", "int4", "int8")), "")


def _bandwidth(name: str) -> Callable[[Sections], Found]:
    """The best share of the measured read bandwidth, percent."""

    def of(sections: Sections) -> Found:
        read = sections.get("ceilings", {}).get("values", {}).get("read")
        rates = [x["gb_per_s"] for x in _lines(sections, "ops", name) if x["gb_per_s"]]
        return 100 * 1e9 * max(rates) / read if read and rates else None

    return of


def _ears(sections: Sections) -> Found:
    parts = [_ms("steps", name)(sections) for name in ("mel, 1 stream", "encoder, 1 chunk")]
    return None if None in parts else sum(p for p in parts if p is not None)


def _value(section: str, name: str) -> Callable[[Sections], Found]:
    return lambda sections: sections.get(section, {}).get("values", {}).get(name)


def _ratio(start: str, end: str = "") -> Callable[[Sections], Found]:
    """The least ratio of the rivals whose name starts and ends so."""

    def of(sections: Sections) -> Found:
        ratios = sections.get("rivals", {}).get("values", {}).get("ratios", {})
        return _least(v for name, v in ratios.items() if name.startswith(start) and name.endswith(end))

    return of


def _live(key: str) -> Callable[[Sections], Found]:
    """Of the run of at least 1,000 sessions that came first."""

    def of(sections: Sections) -> Found:
        runs = sections.get("live", {}).get("values", {}).get("runs", [])
        told = next((run for run in runs if run["sessions"] >= 1000), None)
        return None if told is None else told["latency_ms"]["p99"] if key == "p99" else told[key]

    return of


DECISION, TOKEN = "decision at 4096, host to host", "text token at 1024"
GOALS = (
    Goal("decision, host to host, at 4096, bf16", 2.1, "ms", _ms("steps", DECISION)),
    Goal("decision, host to host, at 4096, fp8", 1.2, "ms", _ms("steps", DECISION, "fp8")),
    Goal("text token at 1024, bf16", 1.7, "ms", _ms("steps", TOKEN)),
    Goal("text token at 1024, fp8", 0.95, "ms", _ms("steps", TOKEN, "fp8")),
    Goal("linear gate_up, 13 rows", 87, "% of read", _bandwidth("linear decoder gate_up, 13 rows"), True),
    Goal("linear down, 13 rows", 87, "% of read", _bandwidth("linear decoder down, 13 rows"), True),
    Goal("linear qkv, 13 rows", 50, "% of read", _bandwidth("linear decoder qkv, 13 rows"), True),
    Goal("linear out, 13 rows", 50, "% of read", _bandwidth("linear decoder out, 13 rows"), True),
    Goal("paged_attention, 13 rows at 1024", 0.006, "ms", _ms("ops", "paged_attention, 1 x 13 rows at 1024")),
    Goal(
        "paged_attention, 64 x 13 rows at 4096", 80, "% of read",
        _bandwidth("paged_attention, 64 x 13 rows at 4096"), True,
    ),
    Goal("mel and encoder, one stream", 0.55, "ms", _ears),
    Goal("1,000 live sessions, 5 % answered: p99", 100, "ms", _live("p99")),
    Goal("1,000 live sessions: deadlines missed", 0, "", _live("missed")),
    Goal("1,000 live sessions: seconds of them", 59.5, "s", _live("seconds"), True),
    Goal("decision: captured torch / ours", 1.5, "x", _ratio("decision at", ": torch + graph / ours"), True),
    Goal("decision after 60 s: published loop / ours", 20, "x", _ratio("decision after 60 s"), True),
    Goal("memory growth", 0, "bytes", _value("engine", "growth_bytes")),
    Goal("memory growth: steps", 10_000, "", _value("engine", "growth_steps"), True),
)  # fmt: skip


def verdicts(sections: Sections) -> list[dict[str, Any]]:
    """Every goal, in order."""
    return [goal.verdict(sections) for goal in GOALS]


def rows(sections: Sections) -> list[str]:
    """The verdicts as lines of the table."""
    found = []
    for told in verdicts(sections):
        measured, met = told["measured"], told["met"]
        value = "not measured" if measured is None else f"{measured:.4g}"
        word = {None: "", True: "met", False: "NOT MET"}[met]
        found.append(f"{told['goal']:46}{told['limit']:>10g} {told['unit']:10}{value:>14}  {word}")
    return found
