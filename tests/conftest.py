"""For every test: one thread, no network, and hypothesis examples that are the same each time.

HYPOTHESIS_PROFILE=thorough make test     many examples, drawn anew each time
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run in several processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# A deadline or a health check that watches the clock fails on a busy machine, not on a bug.
_CLOCK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=25, derandomize=True, database=None, **_CLOCK)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **_CLOCK)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
