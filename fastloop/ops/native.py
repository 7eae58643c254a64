"""The compiled part, `fastloop._native`: loaded once; where it is missing, the reason is kept for `doctor`.

Ops that have a native implementation register it as backend "cpu" if `native` is there, and put `reason`
into their table of unavailable backends if it is not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from .dispatch import Op, P, R

ABI_VERSION = 1  # FASTLOOP_ABI_VERSION of csrc/include/fastloop.h that the wrappers here are written for


def _load() -> tuple[ModuleType | None, str]:
    """The module and "", or None and why it cannot be used."""
    try:
        module = importlib.import_module("fastloop._native")
    except ModuleNotFoundError:
        return None, (
            "fastloop._native is not built: reinstall with a C++ compiler at hand, FASTLOOP_NO_NATIVE unset"
        )
    except ImportError as error:
        return None, f"fastloop._native does not load ({error}); reinstall fastloop on this machine"
    if module.abi_version() != ABI_VERSION:
        return None, (
            f"fastloop._native has ABI version {module.abi_version()}, this code needs {ABI_VERSION}; "
            "it is left over from another build: reinstall fastloop"
        )
    return module, ""


native, reason = _load()


def require_native() -> ModuleType:
    """The compiled module, or ImportError that says why there is none and what to do."""
    if native is None:
        raise ImportError(reason)
    return native


def register_native(op: Op[P, R], implementation: Callable[P, R]) -> None:
    """Make `implementation` the op's backend "cpu" and its default on CPUs; or record why it is not."""
    if native is None:
        op.unavailable["cpu"] = reason
    else:
        op.register("cpu", implementation, default_on="cpu")
