"""Every kernel compiles for every architecture, without spilled registers, within its shared memory.

The compiler wants kernels that are not interpreted, so it runs in a process of its own; triton keeps what it
compiled, so a second run takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fastloop.ops import REGISTRY

ARCHITECTURES = (80, 90, 100)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def report(*options: str) -> list[dict[str, Any]]:
    done = run("-m", "fastloop.triton_kernels.resources", *options)
    assert done.stdout, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], architectures: tuple[int, ...] = ARCHITECTURES) -> None:
    assert not [line for line in found if line["problem"]]
    assert {(line["op"], line["arch"]) for line in found} == {(o, a) for o in REGISTRY for a in architectures}
    assert all(0 < line["registers"] <= 255 and line["spill_bytes"] == 0 for line in found)
    assert any(line["shared_bytes"] > 48 * 1024 for line in found)  # the figure is really read


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_calls_of_one_stream(arch: int) -> None:
    check(report("--quick", "--arch", str(arch)), (arch,))


@pytest.mark.slow
def test_all_calls() -> None:
    found = report(*(part for arch in ARCHITECTURES for part in ("--arch", str(arch))))
    check(found)
    assert len(found) > 300


def test_spills_are_found() -> None:
    """A tile of 128 x 128 sums, that one warp cannot hold."""
    script = """if True:
        from fastloop.triton_kernels.calls import CALLS
        from fastloop.triton_kernels.launch import record_launches
        from fastloop.triton_kernels.resources import compile_launch, read_cubin
        from fastloop.triton_kernels.tuning import overridden
        blocks = {"BLOCK_OUT": 128, "BLOCK_ROWS": 128, "BLOCK_DEPTH": 16, "max_splits": 1}
        with overridden("linear", {**blocks, "warps": 1, "stages": 1}), record_launches() as launches:
            CALLS["linear"]["decoder down, 13 rows"]()
        _, spilled_bytes, _ = read_cubin(compile_launch(launches[0], 80).asm["cubin"])
        print(spilled_bytes)
    """
    done = run("-c", script)
    assert int(done.stdout) > 1000, done.stderr[-2000:]


def test_dependent_launches_wait_before_they_read() -> None:
    """Every kernel's first instruction on memory comes after griddepcontrol.wait."""
    script = """if True:
        from fastloop.triton_kernels.calls import CALLS
        from fastloop.ops.dependent import dependent_launches
        from fastloop.triton_kernels.launch import record_launches
        from fastloop.triton_kernels.resources import compile_launch
        with dependent_launches(True), record_launches() as launches:
            CALLS["rms_norm"]["with a residual"]()
            CALLS["linear"]["decoder down, 13 rows"]()
        for launch in launches:
            ptx = compile_launch(launch, 90).asm["ptx"]
            wait, *others = map(ptx.find, ("griddepcontrol.wait", "ld.global", "cp.async", "st.global"))
            asked = ptx.find("prefetch.global.L2")  # a hint, for weights alone
            print(0 < wait < min(place for place in others if place > 0), 0 < asked < wait)
    """
    done = run("-c", script)
    assert done.stdout.splitlines() == ["True False", "True True", "True False"], done.stderr[-2000:]


def test_what_is_compiled_ahead_for_batches_can_be_called() -> None:
    """Every call that bench/gpu/warm.py makes: products of floats only as far as they are Triton's."""
    script = """if True:
        import sys
        sys.path.append("bench")
        from fastloop.ops.triton import FEW_ROWS
        from fastloop.triton_kernels.launch import record_launches
        from gpu.warm import in_batches
        with record_launches() as launches:
            for call in in_batches():
                call()
        made = [x for x in launches if x.kernel.__name__ == "_linear" and x.constants["FORMAT"] == "plain"]
        kinds = [(x.constants["EPILOGUE"], x.constants["HAS_RESIDUAL"]) for x in made]
        stems = ("gelu", True)  # the second convolution, which is no `linear` of a model
        print(sorted({x.kernel.__name__ for x in launches}))
        print(max(x.arguments["rows"] for x, kind in zip(made, kinds) if kind != stems) == FEW_ROWS)
    """
    done = run("-c", script)
    kernels, few = done.stdout.splitlines() or [done.stderr[-2000:], ""]
    assert few == "True", done.stdout
    for name in ("_add_splits", "_combine", "_first_conv", "_linear", "_paged_attention", "_policy"):
        assert f"'{name}'" in kernels
