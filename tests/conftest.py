"""For every test: one thread, no network, and hypothesis examples that are the same each time.

HYPOTHESIS_PROFILE=thorough make test     many examples, drawn anew each time
"""

from __future__ import annotations

import importlib
import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run in several processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Triton decides when it is imported whether kernels can be interpreted (tests/triton), and other libraries
# import it: so it is imported here first. Kernels are compiled in processes of their own.
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")

# A deadline or a health check that watches the clock fails on a busy machine, not on a bug.
_CLOCK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=25, derandomize=True, database=None, **_CLOCK)
settings.register_profile("thorough", max_examples=1000, print_blob=True, **_CLOCK)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
