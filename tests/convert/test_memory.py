"""Peak memory of a conversion: the largest tensor and its parts, never the whole checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MEASURE = """
import re, sys, torch
from fastloop.convert import convert

def resident(field):  # of this program alone; getrusage's maximum begins with the parent's
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
before = resident("VmRSS")
report = convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
print((resident("VmHWM") - before) / report.weight_bytes)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_a_few_tensors(
    write: dict[str, Callable[..., Any]], tmp_path: Path, dtype: str
) -> None:
    """16 layers of 7.7 MB beside an embedding and a head of 9.7 MB: the whole is never in memory."""
    source = tmp_path / "source"
    write["thinker"](intermediate_size=40_000, num_hidden_layers=16).save_pretrained(source)
    (source / "tokenizer.json").write_text(write["tokenizer"]())
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "ours"), dtype]
    share = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.05 < share < 0.5
