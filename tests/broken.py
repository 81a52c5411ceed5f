"""Deliberately broken copies of kernels, for the tests of the tests."""

import importlib.util
from pathlib import Path


def broken_copy(folder, module, function, text, instead):
    """A copy of a module of Triton kernels with `text` replaced in one function."""
    source = Path(module.__file__).read_text()
    begin = source.index(f"\ndef {function}(")
    end = source.index("\n\n\n", begin)
    assert text in source[begin:end], (function, text)
    body = source[begin:end].replace(text, instead)
    (folder / "broken.py").write_text(source[:begin] + body + source[end:])
    name = f"{module.__package__}.broken"
    spec = importlib.util.spec_from_file_location(name, folder / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    return broken
