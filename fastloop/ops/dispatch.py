"""How an op finds its kernel.

An op is one name with several implementations of one contract. `define` registers it twice: as a
Python callable (what the model calls: no dispatcher overhead, differentiable where the
implementation is) and as `torch.ops.fastloop.<name>` (what others trace, compile and `opcheck`).

Which implementation runs is a table, never a guess: the default for the device, or the one that
`use_backend(...)` or the environment variable FASTLOOP_BACKEND forces. A forced implementation that
does not exist is an error; nothing falls back silently.

An implementation may be limited: to some dtypes, and to calls without gradients (`register(takes=...)`), and
in any other way (`register(refuses=...)`). As a default it serves the calls it takes, and the default that it
was put in front of serves the rest; so a native kernel for float32 leaves bfloat16 tensors, and training,
where they were. It may leave more calls than those (`register(leaves=...)`): the ones that another is faster
for. Forced, it refuses what it does not take.

    FASTLOOP_BACKEND=reference                  every op
    FASTLOOP_BACKEND=mel=reference,linear=torch some ops

"graph" is PyTorch that a graph can capture: no value is read on the host, no shape depends on one. Inside
`capturable()` it stands for the defaults that no graph could capture.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS_OF = {
    "cpu": ("reference", "torch", "graph", "cpu"),
    "cuda": ("reference", "torch", "graph", "flash_attn", "triton", "cuda"),
}
CAPTURED = ("graph", "triton", "cuda")  # what a graph can capture of an op that has a "graph"
BACKENDS = ("reference", "torch", "graph", "cpu", "flash_attn", "triton", "cuda")  # from plain to special
REGISTRY: dict[str, Op[..., Any]] = {}
Limits = Mapping[str, Sequence[torch.dtype]]  # argument -> the dtypes it may have
Refuses = Callable[[Mapping[str, Any]], str]  # a call's arguments -> why they are not taken, or ""
Defaults = tuple[str, ...]  # from special to plain; the last one takes every call


class BackendError(RuntimeError):
    """No usable implementation of an op; the message names the op, the device and the choices."""


def _parse(text: str) -> dict[str, str]:
    """FASTLOOP_BACKEND's value -> {op or "*": backend}."""
    forced: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, backend = part.rpartition("=")
        if backend not in BACKENDS:
            raise BackendError(f"FASTLOOP_BACKEND: unknown backend {backend!r}; choose from {BACKENDS}")
        forced[op or "*"] = backend
    return forced


_forced: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("forced", default=None)


@functools.lru_cache(maxsize=8)
def _from_environment(text: str) -> dict[str, str]:
    forced = _parse(text)
    unknown = sorted(set(forced) - set(REGISTRY) - {"*"})
    if unknown:
        raise BackendError(f"FASTLOOP_BACKEND: unknown ops {unknown}; known are {sorted(REGISTRY)}")
    return forced


def forced_backends() -> dict[str, str]:
    """What `use_backend` or the environment force right now: {op or "*": backend}."""
    inner = _forced.get()
    return inner if inner is not None else _from_environment(os.environ.get("FASTLOOP_BACKEND", ""))


@contextlib.contextmanager
def use_backend(text: str) -> Iterator[None]:
    """Force backends inside a `with` block; the same syntax as FASTLOOP_BACKEND."""
    token = _forced.set(_from_environment(text))
    try:
        yield
    finally:
        _forced.reset(token)


_capturable: contextvars.ContextVar[bool] = contextvars.ContextVar("capturable", default=False)


@contextlib.contextmanager
def capturable() -> Iterator[None]:
    """Inside, what an op runs by default can be captured. What is forced and cannot is refused while
    capturing, never replaced.
    """
    token = _capturable.set(True)
    try:
        yield
    finally:
        _capturable.reset(token)


Launch = Callable[["Op[..., Any]", str, tuple[Any, ...], dict[str, Any]], Any]
_launch: contextvars.ContextVar[Launch | None] = contextvars.ContextVar("launch", default=None)


@contextlib.contextmanager
def launching_through(launch: Launch) -> Iterator[None]:
    """Inside, an op's call is `launch(op, backend, args, kwargs)`: how a recorder sees a step's launches."""
    token = _launch.set(launch)
    try:
        yield
    finally:
        _launch.reset(token)


class Op(Generic[P, R]):
    """One op: its contract (`reference`), its implementations, and the table of defaults.

    Args:
        reference: the definition, in a few lines of PyTorch; annotated, as torch.library reads its
            schema from the annotations.
        fake: same arguments; returns empty tensors of the right shapes (for tracing).
        mutates: names of the arguments changed in place. Where one is optional, torch.ops takes it without
            its default: None is passed.
    """

    def __init__(
        self, name: str, reference: Callable[P, R], fake: Callable[..., Any], mutates: Sequence[str]
    ) -> None:
        self.name = name
        self.reference = reference
        self.implementations: dict[str, Callable[P, R]] = {"reference": reference}
        self.unavailable: dict[str, str] = {}  # backend -> why it cannot run here
        self.limits: dict[str, Limits] = {}  # backend -> what it takes, where that is not every call
        self.refuses: dict[str, Refuses] = {}  # backend -> what else it does not take
        self.leaves: dict[str, Refuses] = {}  # backend -> what it takes and leaves, as a default, to the next
        self.defaults: dict[str, Defaults] = dict.fromkeys(("cpu", "cuda", "meta"), ("reference",))
        self._arguments = list(inspect.signature(reference).parameters)
        schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates))
        # torch 2.11 drops trailing arguments that are as their default says, and then looks for this one.
        for changed in mutates:
            schema = schema.replace(f"? {changed}=None", f"? {changed}")
        self.torch_op = torch.library.custom_op(
            f"fastloop::{name}", self.__call__, mutates_args=tuple(mutates), schema=schema
        )
        self.torch_op.register_fake(fake)
        functools.update_wrapper(self, reference)
        self.__name__ = name

    def register(
        self,
        backend: str,
        implementation: Callable[P, R],
        default_on: str = "",
        takes: Limits | None = None,
        refuses: Refuses | None = None,
        leaves: Refuses | None = None,
    ) -> None:
        """Add an implementation; `default_on` ("cpu", "cuda") makes it the default there.

        takes: limits it to calls in which the arguments named have one of the dtypes, and no gradient is
        wanted. refuses: what else limits it, asked about calls whose dtypes are taken. Neither: every call
        that the op's contract allows is taken. leaves: calls that it takes, but not as the default: there
        the one that it was put in front of serves them.
        """
        if backend not in BACKENDS:
            raise BackendError(f"{self.name}: unknown backend {backend!r}; choose from {BACKENDS}")
        self.implementations[backend] = implementation
        limited = takes is not None or refuses is not None
        if limited:
            self.limits[backend] = takes or {}
        if refuses is not None:
            self.refuses[backend] = refuses
        if leaves is not None:
            self.leaves[backend] = leaves
        if default_on:
            behind = self.defaults[default_on] if limited or leaves is not None else ()
            self.defaults[default_on] = (backend, *behind)

    def backend(self, device: str) -> str:
        """The name of the implementation that runs on a device, or BackendError."""
        choice = self._forced() or next(iter(self._defaults(device)), None)
        serving = BACKENDS_OF.get(device, ("reference",))
        if choice in self.implementations and choice in serving:
            return choice
        why = f"it serves no {device} tensors"
        if choice in serving or choice is None:
            why = self.unavailable.get(choice or "", "not implemented")
        raise BackendError(
            f"op {self.name} on {device}: backend {choice!r} cannot run here ({why}); available are "
            f"{[b for b in serving if b in self.implementations]}. Change FASTLOOP_BACKEND or run "
            "`fastloop doctor`."
        )

    def _forced(self) -> str | None:
        forced = forced_backends()
        return forced.get(self.name) or forced.get("*")

    def _defaults(self, device: str) -> Defaults:
        """Those that may serve now."""
        known = self.defaults.get(device, ())
        if not _capturable.get() or "graph" not in self.implementations:
            return known
        return (*(backend for backend in known if backend in CAPTURED), "graph")

    def refusal(self, backend: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Why an implementation does not take these arguments, or ""."""
        limits = self.limits.get(backend)
        if limits is None:
            return ""
        given = self._named(args, kwargs)
        for name, dtypes in limits.items():
            if given[name].dtype not in dtypes:
                names = " or ".join(str(dtype) for dtype in dtypes)
                return f"it takes {name} in {names}, got {given[name].dtype}"
        if backend in self.refuses and (why := self.refuses[backend](given)):
            return why
        if torch.is_grad_enabled():
            for name, value in given.items():
                if isinstance(value, Tensor) and value.requires_grad:
                    return f"it computes no gradient, and {name} requires one"
        return ""

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._arguments, args, strict=False)), **kwargs}

    def serving(self, device: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The default that runs a call on a device."""
        return next(b for b in self._defaults(device) if self._serves(b, args, kwargs))

    def _serves(self, backend: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a default takes this call and leaves it to no other one."""
        if self.refusal(backend, args, kwargs):
            return False
        leaves = self.leaves.get(backend)
        return leaves is None or not leaves(self._named(args, kwargs))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        backend, launch = self.backend(device), _launch.get()
        if not self._forced():
            backend = self.serving(device, args, kwargs)
        elif refusal := self.refusal(backend, args, kwargs):
            raise BackendError(
                f"op {self.name} on {device}: backend {backend!r} cannot run this call ({refusal}). Convert "
                "the arguments or change FASTLOOP_BACKEND."
            )
        if launch is not None:
            return launch(self, backend, args, kwargs)
        return self.implementations[backend](*args, **kwargs)


def define(reference: Callable[P, R], fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Op[P, R]:
    """Register the op whose definition is `<name>_ref`."""
    name = reference.__name__.removesuffix("_ref")
    op = Op(name, reference, fake, mutates)
    REGISTRY[name] = op
    return op
