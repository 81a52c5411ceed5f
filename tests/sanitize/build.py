"""Builds csrc/bindings with the row kernels, for test_row_kernels.py and for the sanitizers."""

import glob
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import setuptools

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
# -O1 and line numbers: the instrumentation keeps the loops from being vectorised anyway.
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]


def setup_flags() -> list[str]:
    """The compiler flags of the library, from setup.py itself."""
    run_setup = setuptools.distutils.core.run_setup
    distribution = run_setup(str(ROOT / "setup.py"), stop_after="init")
    return distribution.ext_modules[0].extra_compile_args


def build(*variants: str, flags: list[str]) -> dict[str, Path]:
    """The module's path for each variant: "plain", or what follows -fsanitize=.

    ninja compiles the files of every variant side by side, and only those that changed.
    """
    sources = ["csrc/cpu_level.cpp"]
    for pattern in ("csrc/*/prepare.cpp", "csrc/*/cpu_*.cpp", "csrc/bindings/*.cpp"):
        sources += sorted(glob.glob(pattern, root_dir=ROOT))
    includes = [f"-I{x}" for x in (sysconfig.get_paths()["include"], pybind11.get_include())]
    rules = f"""
builddir = build/bindings
rule compile
  command = {COMPILER} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {COMPILER} $flags -shared $in -o $out
"""
    modules = {}
    for variant in variants:
        own = [] if variant == "plain" else SANITIZED + [f"-fsanitize={variant}"]
        line = shlex.join([*flags, *includes, "-fPIC", "-pthread", *own])
        objects = [f"build/bindings/{variant}/{x.replace('/', '_')}.o" for x in sources]
        for source, compiled in zip(sources, objects, strict=True):
            rules += f"build {compiled}: compile {source}\n  flags = {line}\n"
        module = f"build/bindings/{variant}/row_kernels.so"
        rules += f"build {module}: link {' '.join(objects)}\n  flags = {line}\n"
        modules[variant] = ROOT / module
    script = ROOT / "build" / "bindings" / f"{'-'.join(variants)}.ninja"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(rules)
    subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", ROOT, "-f", script], check=True)
    return modules
