"""Loads the compiled library; never raises. What went wrong is kept
for whoever asks for it by name.
"""

import importlib

import torch

torch.library.define("kdkernels::cpu_level", "() -> int")

_error: str | None = None

try:
    importlib.import_module("kdkernels._C")  # importing it registers its kernels
except ImportError as error:
    _error = str(error)


def cpp_error() -> str | None:
    """Why the C++ library is not there, or None where it is."""
    return _error


def cpu_level() -> str:
    """The instruction set that the C++ library uses here: "avx512", "avx2", "baseline",
    or "none" without the library.
    """
    if _error is not None:
        return "none"
    return {4: "avx512", 3: "avx2", 0: "baseline"}[torch.ops.kdkernels.cpu_level()]
