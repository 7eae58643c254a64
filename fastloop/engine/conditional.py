"""A CUDA graph that repeats itself: one WHILE node whose body the device runs until a condition is zero.

    capture_loop(body, condition, pool) -> LoopGraph     body: captured work, which leaves `condition` behind

The host launches it once; the body's last kernel (csrc/cuda/condition.cu) gives the node the condition. torch
has no call for it, so the graph is made through cuda-bindings, which comes with torch's CUDA builds. It needs
CUDA 12.4 in driver and bindings; `refusal` says what is missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FastloopError
from ..ops.cuda_images import architecture, image, source_folder
from ..ops.dispatch import BackendError

CUDA_NEEDED = 12_040  # conditional nodes
KERNEL = "fastloop_condition"


class ConditionalError(FastloopError):
    """CUDA refused a call while a conditional graph was made or launched."""


@dataclass(frozen=True)
class LoopGraph:
    """An instantiated graph of one WHILE node, and what must live as long as it."""

    launch: Callable[[int], None]  # stream
    kept: tuple[Any, ...]

    def replay(self) -> None:
        """Launch the loop on the current stream; nothing is awaited."""
        self.launch(torch.cuda.current_stream().cuda_stream)


def bindings() -> Any:
    """cuda.bindings.driver; ImportError where it is not installed."""
    return importlib.import_module("cuda.bindings.driver")


def refusal(device: torch.device) -> str:
    """Why `capture_loop` cannot work on a device, or ""."""
    if device.type != "cuda":
        return f"a WHILE node is a CUDA graph's, and this is {device}"
    try:
        driver = bindings()
        version = call(driver.cuDriverGetVersion())
    except ImportError as error:
        return f"cuda-bindings is not installed ({error}); pip install cuda-bindings"
    except RuntimeError as error:  # no driver
        return f"cuda-bindings finds no driver: {error}"
    if not hasattr(driver, "cuGraphConditionalHandleCreate"):
        return "this cuda-bindings knows no conditional nodes; install 12.4 or newer"
    if version < CUDA_NEEDED:
        return f"the driver serves CUDA {version // 1000}.{version % 1000 // 10}, conditional nodes need 12.4"
    try:
        _condition_image(torch.cuda.get_device_capability(device))
    except BackendError as error:
        return str(error)
    return ""


def call(result: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returned behind its error code; ConditionalError where that is not 0."""
    error, *values = result
    if int(error):
        raise ConditionalError(f"CUDA: {error}")
    return values[0] if len(values) == 1 else tuple(values)


def capture_loop(body: Callable[[], None], condition: Tensor, pool: Any) -> LoopGraph:
    """The graph that runs `body` once and then as long as `condition` (int32 [1]) is not zero.

    Captured on the current stream, which is not the default one; what the body allocates lies in `pool`, a
    torch.cuda.MemPool. The body must have run before: libraries and kernels load in their first calls.
    """
    driver, stream = bindings(), torch.cuda.current_stream()
    module, kernel = _kernel(driver, torch.cuda.get_device_capability(stream.device))
    graph = call(driver.cuGraphCreate(0))
    context, always = call(driver.cuCtxGetCurrent()), driver.CU_GRAPH_COND_ASSIGN_DEFAULT
    handle = call(driver.cuGraphConditionalHandleCreate(graph, context, 1, always))  # 1 at every launch
    inside = _while_node(driver, graph, context, handle)
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    raw = stream.cuda_stream
    with torch.cuda.use_mem_pool(pool, device=stream.device):
        call(driver.cuStreamBeginCaptureToGraph(raw, inside, None, None, 0, mode))
        try:
            body()
            _launch_condition(driver, kernel, handle, condition, raw)
        except BaseException:
            driver.cuStreamEndCapture(raw)
            raise
        call(driver.cuStreamEndCapture(raw))
    executable = call(driver.cuGraphInstantiate(graph, 0))

    def launch(on: int) -> None:
        call(driver.cuGraphLaunch(executable, on))

    return LoopGraph(launch, (graph, executable, module, pool, condition, body))


def _while_node(driver: Any, graph: Any, context: Any, handle: Any) -> Any:
    """Add the node; returns the graph of its body, empty."""
    params = driver.CUgraphNodeParams()
    params.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    params.conditional.handle = handle
    params.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
    params.conditional.size = 1
    params.conditional.ctx = context
    edges = (None,) if driver.CUDA_VERSION >= 13_000 else ()  # what edges carry: an argument since CUDA 13
    call(driver.cuGraphAddNode(graph, None, *edges, 0, params))
    return params.conditional.phGraph_out[0]


def _launch_condition(driver: Any, kernel: Any, handle: Any, condition: Tensor, stream: int) -> None:
    arguments = ((int(handle), condition.data_ptr()), (ctypes.c_ulonglong, ctypes.c_void_p))
    call(driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0))


def _kernel(driver: Any, capability: tuple[int, int]) -> tuple[Any, Any]:
    """The module and its kernel, loaded: nothing may be loaded during a capture."""
    module = call(driver.cuModuleLoadData(_condition_image(capability)))
    kernel = call(driver.cuModuleGetFunction(module, KERNEL.encode()))
    call(driver.cuFuncLoad(kernel))
    return module, kernel


@functools.cache
def _condition_image(capability: tuple[int, int]) -> bytes:
    """The code of csrc/cuda/condition.cu: by the NVRTC that comes with torch, else as any kernel's."""
    arch = architecture(*capability)
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        return compile_condition(nvrtc, arch)
    except (ImportError, RuntimeError, ConditionalError):
        return image("condition", arch)


def compile_condition(nvrtc: Any, arch: str) -> bytes:
    """A cubin of csrc/cuda/condition.cu by cuda.bindings.nvrtc."""
    source = (source_folder() / "condition.cu").read_bytes()
    program = call(nvrtc.nvrtcCreateProgram(source, b"condition.cu", 0, None, None))
    option = f"--gpu-architecture={arch}".encode()
    call(nvrtc.nvrtcCompileProgram(program, 1, [option]))
    made = bytes(call(nvrtc.nvrtcGetCUBINSize(program)))
    call(nvrtc.nvrtcGetCUBIN(program, made))
    return made
