"""Which implementation serves a call: the one place that decides, and says why.

``reference`` is plain torch and serves everything. ``cpp`` is the compiled library behind
``torch.ops.kdkernels``; it serves CPU tensors. An op passes its reference module and gets back
something with the same functions.
"""

from types import ModuleType
from typing import Any

import torch

from .. import _ext

NAMES = ("cpp", "reference")


def backends() -> list[tuple[str, bool, str]]:
    """(name, available, reason) of every backend on this machine."""
    error = _ext.cpp_error()
    cpp = "CPU tensors" if error is None else f"the C++ library does not load: {error}"
    return [
        ("cpp", error is None, cpp),
        ("reference", True, "plain torch, any device and dtype"),
    ]


def choose(backend: str | None, device: torch.device) -> tuple[str, str]:
    """(backend, why) for tensors on a device; raises where a backend asked for by name
    cannot serve them.
    """
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown; accepted: None, {', '.join(NAMES)}")
    if backend == "reference":
        return "reference", "asked for by name"
    error = _ext.cpp_error()
    if error is not None:
        refusal = f"the C++ library does not load: {error}"
    elif device.type != "cpu":
        refusal = f"the C++ library serves CPU tensors, these are on {device}"
    else:
        return "cpp", "asked for by name" if backend else "CPU tensors and the C++ library is there"
    if backend == "cpp":
        raise RuntimeError(f"backend='cpp' cannot serve this call: {refusal}")
    return "reference", refusal


def define(schemas: dict[str, str], reference: ModuleType) -> None:
    """Define an op's schemas, with its reference as the kernel of every device that has no other,
    and as the fake kernel.
    """
    for name, schema in schemas.items():
        torch.library.define(f"kdkernels::{name}", schema)
        torch.library.impl(
            f"kdkernels::{name}", "CompositeExplicitAutograd", getattr(reference, name)
        )


def implementation(name: str, reference: ModuleType) -> Any:
    """The functions of a backend: the op's reference module, or the dispatched ops."""
    return reference if name == "reference" else torch.ops.kdkernels
