"""What a section writes down: values and timed lines, saved as they come, so that a crash keeps them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastloop.config import ModelConfig


@dataclass(frozen=True)
class Context:
    """What every section needs to know."""

    device: str  # "cuda", or "cpu" in a dry run
    dry: bool
    config: ModelConfig
    dtype: torch.dtype
    out: Path
    parts: Path  # for files that are not results
    ends: float  # time.monotonic() at which the section must have ended
    ceilings: dict[
        str, float
    ]  # "read" bytes/s, "copy" bytes/s, "matmul" operations/s; {} before they are known

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()


@dataclass
class Record:
    """One section's results: `values`, and `lines` for the table."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def put(self, **values: Any) -> None:
        self.values |= values
        self.save()

    def line(
        self,
        name: str,
        variant: str,
        seconds: Any,
        moved: float = 0,
        operations: float = 0,
        ceilings: dict[str, float] | None = None,
        note: str = "",
    ) -> None:
        """A Timing (or one number of seconds) of `variant` of `name`; share: of the roofline, the longer of
        bytes at the measured read bandwidth and operations at the measured matrix rate.
        """
        median = getattr(seconds, "median", seconds)
        floors = {}
        if ceilings:
            floors = {"read": moved / ceilings["read"], "matmul": operations / ceilings["matmul"]}
        bound = max(floors, key=lambda k: floors[k]) if floors and max(floors.values()) > 0 else ""
        self.lines.append(
            {
                "name": name,
                "variant": variant,
                "median_us": 1e6 * median,
                "p99_us": 1e6 * getattr(seconds, "p99", median),
                "bytes": moved,
                "operations": operations,
                "gb_per_s": moved / median / 1e9 if moved else None,
                "share": floors[bound] / median if bound else None,
                "bound": bound,
                "note": note,
            }
        )
        self.save()

    def problem(self, text: str) -> None:
        """Something that is wrong; the check ends with exit code 1."""
        self.problems.append(text)
        self.save()

    def save(self) -> None:
        content = {"values": self.values, "lines": self.lines, "problems": self.problems}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1, default=str))
        temporary.replace(self.path)
