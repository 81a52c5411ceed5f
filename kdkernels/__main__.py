"""`python -m kdkernels`: versions, the CPU level in use, and which backends work here and why."""

import importlib.metadata
import platform

import torch

from . import __version__, _ext
from .ops._backend import backends
from .ops.linear_distillation_loss import bfloat16_product


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """Two tables as text: name and value of what kdkernels runs on; backend, available, reason."""
    facts = [
        ("kdkernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("numpy", _installed("numpy")),
        ("triton", _installed("triton")),
        ("CPU level", _ext.cpu_level()),
        ("threads", str(torch.get_num_threads())),
        ("bf16 GEMM", bfloat16_product()),
    ]
    lines = [f"{name:<11}{value}" for name, value in facts]
    lines += ["", f"{'backend':<13}{'available':<11}reason"]
    lines += [f"{name:<13}{'yes' if ok else 'no':<11}{reason}" for name, ok, reason in backends()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
