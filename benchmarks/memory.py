"""Peak memory of one contestant, in a process of its own.

    python -m benchmarks.memory jsd float32 512 32000 "cpp, fresh" 2

Prints the bytes of resident memory that one loss and gradient adds, at its peak, to a process that
holds the inputs. Linux only: /proc/self/clear_refs sets the peak back to the present. Before that
the contestant runs once on other inputs of 64 columns (libraries, threads), so that whatever it
keeps per vocabulary, scratch included, counts; torch.compile, which compiles for one shape, runs
once at the real one. Freed memory is handed back to the system, so that its reuse counts too.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from .cases import CONTESTANTS, Case, make_inputs


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_bytes(case: Case, contestant: str) -> int:
    step = CONTESTANTS[contestant].make(case)
    inputs = make_inputs(case)
    warm = inputs if contestant == "torch.compile" else make_inputs(replace(case, vocab=64))
    step(warm.student.clone(), warm)
    student = inputs.student.clone()
    return added_by(lambda: step(student, inputs))


def added_by(call: Callable[[], object]) -> int:
    """Bytes of resident memory that a call adds at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


if __name__ == "__main__":
    divergence, dtype, rows, vocab, contestant, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(peak_bytes(Case(divergence, dtype, int(rows), int(vocab), (contestant,)), contestant))
