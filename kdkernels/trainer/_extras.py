"""The trainer's libraries are an optional extra; say so when one is missing."""

from __future__ import annotations

import importlib


def require(*modules: str, extra: str = "demo") -> None:
    """Raise ImportError naming the extra to install if any of `modules` cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"kdkernels.trainer needs {module}, which cannot be imported ({error}): "
                f"pip install kdkernels[{extra}]"
            ) from error
