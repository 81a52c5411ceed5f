"""Which implementation serves a call: the one place that decides, and says why.

``reference`` is plain torch and serves everything. ``cpp`` is the compiled libraries behind
``torch.ops.kdkernels``, one for CPU and one for CUDA tensors. ``triton`` are ops of their own,
``kdkernels::<op>_triton``; its kernels are imported on first use. An op asks for one of its
functions by name.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .. import _ext

NAMES = ("cpp", "triton", "reference")


def backends() -> list[tuple[str, bool, str]]:
    """(name, available, reason) of every backend on this machine."""
    cpp, cuda = _ext.cpp_error(), _ext.cuda_error()
    triton = _triton_error("cuda") if torch.cuda.is_available() else _triton_error("cpu")
    return [
        ("cpp (CPU)", cpp is None, cpp or "CPU tensors"),
        ("cpp (CUDA)", cuda is None, cuda or "CUDA tensors of all dtypes but float64"),
        ("triton", triton is None, triton or "CUDA tensors of all dtypes but float64"),
        ("reference", True, "plain torch, any device and dtype"),
    ]


def choose(
    backend: str | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    on_devices: tuple[str, ...] = ("cpp", "triton"),
) -> tuple[str, str]:
    """(backend, why) for tensors of these dtypes on a device; raises where a backend asked for by
    name cannot serve them. ``on_devices``: in which the op has kernels for CUDA tensors.
    """
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend={backend!r} is unknown; accepted: None, {', '.join(NAMES)}")
    if backend == "reference":
        return "reference", "asked for by name"
    if backend is not None:
        refusal = _refusal(backend, device, dtypes, on_devices)
        if refusal is not None:
            raise RuntimeError(f"backend={backend!r} cannot serve this call: {refusal}")
        return backend, "asked for by name"
    # On CPU tensors Triton's kernels run in an emulator: for tests, when asked for.
    refusals: list[str] = []
    for name in (on_devices or ("cpp",)) if device.type == "cuda" else ("cpp",):
        refusal = _refusal(name, device, dtypes, on_devices)
        if refusal is None:
            library = " and the C++ library is there" if name == "cpp" else ""
            tensors = {"cpu": "CPU tensors", "cuda": "CUDA tensors"}[device.type]
            return name, "; ".join([tensors + library, *refusals])
        refusals.append(f"not {name}: {refusal}")
    return "reference", "; ".join(refusals)


def warn_of_reference(backend: str, why: str, device: torch.device) -> None:
    """One warning a reason where CUDA tensors fall back to plain torch."""
    if backend == "reference" and device.type == "cuda" and not torch.compiler.is_compiling():
        if why not in _warned and why != "asked for by name":
            _warned.add(why)
            warnings.warn(f"kdkernels runs in plain torch, slowly: {why}", stacklevel=4)


_warned: set[str] = set()


def _refusal(
    backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], on_devices: tuple[str, ...]
) -> str | None:
    """Why a backend cannot serve tensors on this type of device, or None."""
    if device.type not in ("cpu", "cuda"):
        return f"it serves CPU and CUDA tensors, these are on {device}"
    if backend == "cpp" and device.type == "cpu":
        error = _ext.cpp_error()
        return None if error is None else f"the C++ library does not load: {error}"
    if backend not in on_devices:
        missing = {"cpp": "CUDA", "triton": "Triton"}[backend] if on_devices else "CUDA or Triton"
        return f"this op has no {missing} kernels yet"
    error = _cuda_error(device.index) if backend == "cpp" else _triton_error(device.type)
    if error is not None:
        return error
    if torch.float64 in dtypes:
        return "its kernels take no float64; accepted: float32, bfloat16, float16"
    return None


@torch.compiler.assume_constant_result
def _cuda_error(device: int | None) -> str | None:
    """Why the CUDA library cannot serve tensors on this GPU, or None."""
    error = _ext.cuda_error()
    if error is not None:
        return f"the CUDA library does not load: {error}"
    # Fake tensors do not start CUDA, and have no GPU to ask.
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability(device) < (8, 0):
        return "the CUDA library is compiled for compute capability 8.0 and newer"
    return None


@torch.compiler.assume_constant_result
def _triton_error(device: str) -> str | None:
    """Why Triton's kernels cannot run on tensors of this type of device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # runs kernels on both, in NumPy
    try:
        import triton

        # Where its kernels run: a GPU, or the CPU under an emulating driver.
        runs_on = triton.runtime.driver.active.get_active_torch_device().type
    except Exception as error:  # no driver, or its helper in C does not compile: any error
        return f"Triton has no driver here: {error}"
    if runs_on != device:
        return f"Triton's active driver runs on {runs_on} tensors, these are on {device}"
    return None


def define(schemas: dict[str, str], reference: ModuleType, kernels: str | None = None) -> None:
    """Define an op's schemas, with its reference as the kernel of every device that has no other,
    and as the fake kernel unless it has ``<op>_fake`` (a loop over rows cannot run on a symbolic
    number of them). ``kernels``: the module of its Triton kernels, imported on first use.
    """
    for name, schema in schemas.items():
        torch.library.define(f"kdkernels::{name}", schema)
        torch.library.impl(
            f"kdkernels::{name}", "CompositeExplicitAutograd", getattr(reference, name)
        )
        fake = getattr(reference, f"{name}_fake", None)
        if fake is not None:
            torch.library.register_fake(f"kdkernels::{name}", fake)
        if kernels is None:
            continue
        torch.library.define(f"kdkernels::{name}_triton", schema)
        torch.library.impl(
            f"kdkernels::{name}_triton", ("CPU", "CUDA"), functools.partial(_launch, kernels, name)
        )
        torch.library.register_fake(
            f"kdkernels::{name}_triton", fake if fake is not None else getattr(reference, name)
        )


def _launch(kernels: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(kernels), name)(*args)


def implementation(backend: str, op: str, reference: ModuleType) -> Callable:
    """A backend's function for an op: the reference module's, or the dispatched op."""
    if backend == "reference":
        return getattr(reference, op)
    return getattr(torch.ops.kdkernels, f"{op}_triton" if backend == "triton" else op)
