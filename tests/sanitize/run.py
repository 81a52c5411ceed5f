"""Runs the C++ row kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Each first has to find a bug that csrc/bindings plants in a call of a kernel, so that silence on the
cases (cases.py) means something.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import build

CASES = Path(__file__).with_name("cases.py")


class Sanitizer(NamedTuple):
    name: str  # of -fsanitize=
    preload: tuple[str, ...]  # into an interpreter that was linked without them
    options: dict[str, str]
    bug: str  # for bindings' planted()
    finds: str  # what the sanitizer says of it


# PYTHONMALLOC=malloc: Python's own pools hide where an object ends. No leak detection: it reports
# the interpreter's memory, and all that the kernels allocate is one unique_ptr (csrc/scratch.h).
# float-divide-by-zero and float-cast-overflow, not part of "undefined", stay out: the kernels
# compute with inf and NaN on purpose, as IEEE 754 defines them.
SANITIZERS = (
    Sanitizer(
        "address",
        # libstdc++ so that libasan finds __cxa_throw, which it intercepts, before
        # the module is loaded.
        ("libasan.so", "libstdc++.so.6"),
        {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
        bug="one column too many",
        finds="heap-buffer-overflow",
    ),
    Sanitizer(
        "undefined",
        (),
        {"UBSAN_OPTIONS": "print_stacktrace=1"},
        bug="offset of a row past 2^63",
        finds="signed integer overflow",
    ),
    Sanitizer(
        "thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "halt_on_error=1", "PYTHONMALLOC": "malloc"},
        bug="one row given to two threads",
        finds="data race",
    ),
)


def environment(sanitizer):
    def library(name):
        told = subprocess.check_output([build.COMPILER, f"-print-file-name={name}"], text=True)
        return os.path.realpath(told.strip())

    preload = ":".join(library(name) for name in sanitizer.preload)
    return {**os.environ, **sanitizer.options, "LD_PRELOAD": preload}


def main():
    start = time.perf_counter()
    modules = build.build(*(s.name for s in SANITIZERS), flags=build.setup_flags())
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    for sanitizer in SANITIZERS:
        start = time.perf_counter()
        command = [sys.executable, CASES, modules[sanitizer.name]]
        env = environment(sanitizer)
        planted = subprocess.run([*command, sanitizer.bug], env=env, capture_output=True, text=True)
        if planted.returncode == 0 or sanitizer.finds not in planted.stderr:
            sys.exit(
                f"{sanitizer.name}: the planted bug ({sanitizer.bug}) was not found:\n"
                f"{planted.stderr}"
            )
        result = subprocess.run(command, env=env)
        if result.returncode != 0:
            sys.exit(f"{sanitizer.name}: failed, exit status {result.returncode}")
        seconds = time.perf_counter() - start
        print(f"{sanitizer.name}: no finding; planted bug found; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
