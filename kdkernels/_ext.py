"""Loads the compiled libraries; never raises. What went wrong is kept
for whoever asks for one by name.
"""

import importlib

import torch

torch.library.define("kdkernels::cpu_level", "() -> int")


def _load(library: str) -> str | None:
    """Import a library, which registers its kernels; why that failed, or None."""
    try:
        importlib.import_module(library)
    except ImportError as error:
        return str(error)
    return None


_cpp_error = _load("kdkernels._C")
# Two libraries, because one that refers to torch's CUDA stream does not import on a CPU-only torch.
_cuda_error = (
    _load("kdkernels._C_cuda")
    if torch.version.cuda
    else f"torch {torch.__version__} is built without CUDA"
)


def cpp_error() -> str | None:
    """Why the C++ library is not there, or None where it is."""
    return _cpp_error


def cuda_error() -> str | None:
    """Why the CUDA library is not there, or None where it is."""
    return _cuda_error


def cpu_level() -> str:
    """The instruction set that the C++ library uses here: "avx512", "avx2", "baseline",
    or "none" without the library.
    """
    if _cpp_error is not None:
        return "none"
    return {4: "avx512", 3: "avx2", 0: "baseline"}[torch.ops.kdkernels.cpu_level()]
