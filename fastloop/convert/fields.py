"""Fields of a foreign config: read with their type, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..files import CheckpointError, quote


class Fields:
    """A mapping of a foreign config with defaults; every error names file and field."""

    def __init__(self, values: Any, where: str, defaults: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where}: must be a table of fields, is {quote(values)}")
        self.where = where
        self._values = {**defaults, **{k: v for k, v in values.items() if v is not None}}

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise CheckpointError(f"{self.where}: {name} must be a positive integer, is {quote(value)}")
        return value

    def number(self, name: str) -> float:
        """A positive number; YAML 1.1 reads a bare 1e-06 as text, so text that spells a number is one."""
        value = self._values.get(name)
        try:
            number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise CheckpointError(f"{self.where}: {name} must be a positive number, is {quote(value)}")
        return number

    def require(self, supported: Mapping[str, Any]) -> None:
        """Each field has the one value that this architecture knows; all that have not are named."""
        wrong = [
            f"{name} is {quote(self._values.get(name))}, supported is {wanted!r}"
            for name, wanted in supported.items()
            if self._values.get(name) != wanted
        ]
        if wrong:
            raise CheckpointError(f"{self.where}: not a Qwen2.5 architecture: {'; '.join(wrong)}")
