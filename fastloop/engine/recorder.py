"""A recorder in software: what a CUDA graph does to a step, on the CPU, where every rule can be checked.

    with record(static, constants) as recorder: step()    -> recorder.tape: launches with their addresses
    tape.replay()                              the same launches on what the static buffers hold now

A launch is one op of fastloop.ops, whatever implementation it has, or one PyTorch op in between; views are
addresses and no launches. What a graph cannot do is refused with a `CaptureError` that names the op:

- reading a value on the host (.item(), .tolist(), if tensor:), also inside an op's implementation;
- a shape that depends on a value (nonzero, masks as indices), or memory that does;
- a tensor that the host has filled during the step: replays would see it as it was then;
- reading or writing memory that is neither a static buffer, nor a constant, nor made by the step itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..ops.contract import unread_values
from ..ops.dispatch import Op, launching_through


class CaptureError(RuntimeError):
    """A step does what a captured step cannot; the message names the op and what to do."""


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of memory."""

    start: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> Span:
        """All memory that a tensor is a view of."""
        storage = tensor.untyped_storage()
        return cls(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


@dataclass(frozen=True)
class Launch:
    """One op of the tape: what it reads and writes, and how it is run again."""

    name: str
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    run: Callable[[], Any]
    results: tuple[Tensor, ...]  # made by the op: a replay writes to the same addresses
    static: tuple[str, ...]  # static buffers among what it writes

    def replay(self) -> None:
        made = [leaf for leaf in tree_leaves(self.run()) if isinstance(leaf, Tensor)]
        for result, new in zip(self.results, made, strict=bool(self.results)):
            result.copy_(new)


@dataclass
class Tape:
    """The launches of one step, in order."""

    launches: list[Launch] = field(default_factory=list)

    def replay(self) -> None:
        """Run the step again on what its static buffers hold now; results lie where they lay before."""
        with torch.inference_mode(), unread_values():
            for launch in self.launches:
                launch.replay()

    def __str__(self) -> str:
        lines = ((n.name, len(n.reads), " ".join(n.static) or "own memory") for n in self.launches)
        return "\n".join(f"{name:32} reads {reads} writes {target}" for name, reads, target in lines)


@contextlib.contextmanager
def record(static: Mapping[str, Tensor], constants: Iterable[Tensor]) -> Iterator[Recorder]:
    """Record what runs inside on the CPU; it runs, too.

    static: buffers of fixed address that the step may read and write; constants: those it may only read.
    """
    recorder = Recorder(static, constants)
    with recorder.function_mode, recorder, launching_through(recorder.launch), unread_values():
        yield recorder


# Tensor methods that hand values to the host without an op that a dispatch mode could see.
_HOST_READS = {
    *("tolist", "item", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__"),
    *("__contains__", "__dlpack__", "is_nonzero"),
}


class _HostReads(TorchFunctionMode):
    """Refuses the calls of _HOST_READS."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in _HOST_READS:
            where = self._recorder.where
            raise CaptureError(f"{name}{where} reads a value on the host; keep it on the device")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """See `record`. `tape` grows as the step runs."""

    def __init__(self, static: Mapping[str, Tensor], constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.tape = Tape()
        self.function_mode = _HostReads(self)
        self._static = {Span.of(tensor).start: name for name, tensor in static.items()}
        self._constants = {Span.of(tensor).start for tensor in constants}
        self._own: dict[int, Tensor] = {}  # memory that the step made; held, so that no address comes twice
        self._inside: str = ""  # the op of fastloop.ops whose implementation is running

    @property
    def where(self) -> str:
        """For messages: the op whose implementation is running."""
        return f" in {self._inside}" if self._inside else ""

    def launch(self, op: Op[..., Any], backend: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op of fastloop.ops is one launch; its implementation runs under the same rules."""
        implementation = op.implementations[backend]
        name = f"{op.name}[{backend}]"
        schema = getattr(torch.ops.fastloop, op.name).default._schema
        written = _written(schema, args, kwargs)
        self._check(name, args, kwargs, written)
        outer, self._inside = self._inside, name
        try:
            out = implementation(*args, **kwargs)
        finally:
            self._inside = outer
        return self._record(name, implementation, args, kwargs, written, out)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._refuse(func, args, kwargs)
        written = _written(func._schema, args, kwargs)
        name = f"{func.namespace}::{func._schema.name.split('::')[-1]}"
        self._check(name, args, kwargs, written)
        out = func(*args, **kwargs)
        return self._record(name, func, args, kwargs, written, out)

    def _record(
        self, name: str, function: Any, args: Any, kwargs: Any, written: list[Tensor], out: Any
    ) -> Any:
        """Put a launch on the tape, unless it is a view, or part of an op that is one launch as a whole."""
        reads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {Span.of(tensor).start for tensor in reads if tensor.numel()}
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in outs if tensor.numel() and Span.of(tensor).start not in known]
        for tensor in fresh:
            self._own[Span.of(tensor).start] = tensor
        if self._inside or not (fresh or written):
            return out
        assert not fresh or len(fresh) == len([t for t in outs if t.numel()]), f"{name}: half a view"
        places = [Span.of(t) for t in (*written, *fresh)]
        self.tape.launches.append(
            Launch(
                name=name,
                reads=tuple(Span.of(tensor) for tensor in reads),
                writes=tuple(places),
                run=lambda: function(*args, **kwargs),
                results=tuple(outs) if fresh else (),
                static=tuple(self._static[p.start] for p in places if p.start in self._static),
            )
        )
        return out

    def _refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """What no graph can capture, whatever the tensors."""
        where = self.where
        if torch.Tag.data_dependent_output in func.tags or "is_nonzero" in func._schema.name:
            raise CaptureError(f"{func}{where} reads a value on the host; keep it on the device")
        if "lift_fresh" in func._schema.name:
            raise CaptureError(
                f"{func}{where}: the host fills a tensor during the step, and replays would see it as it is "
                "now; put it into a static buffer"
            )
        indexed = func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_")
        masked = indexed and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        dynamic = torch.Tag.dynamic_output_shape in func.tags and not indexed
        repeats = func._schema.name == "aten::repeat_interleave" and isinstance(args[-1], Tensor)
        if masked or dynamic or repeats:
            raise CaptureError(
                f"{func}{where}: its shape depends on values; use torch.where, or indices of fixed number"
            )

    def _check(self, name: str, args: Any, kwargs: Any, written: list[Tensor]) -> None:
        """Only memory that a replay may take for granted is read, and only what is the step's is written."""
        where = self.where
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            start = Span.of(tensor).start
            if start in self._static or start in self._own:
                continue
            told = f"{tensor.dtype} {list(tensor.shape)}"
            if start not in self._constants:
                raise CaptureError(
                    f"{name}{where} reads {told}, which is neither a static buffer nor a constant nor made "
                    "by the step; name it in `static` or `constants`"
                )
            if any(tensor is target for target in written):
                raise CaptureError(f"{name}{where} writes {told}, a constant; name it in `static`")


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call changes, by its op's schema."""
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
    targets = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for name in targets for t in tree_leaves(given.get(name)) if isinstance(t, Tensor)]
