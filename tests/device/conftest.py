"""Device kernels run on the CPU, from the PTX that a GPU would get (../shared/ptxrun)."""

import contextlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

_SHARED = Path(__file__).parents[3] / "shared" / "ptxrun"
if _SHARED.is_dir() and str(_SHARED) not in sys.path:
    sys.path.append(str(_SHARED))


def _missing() -> str | None:
    if importlib.util.find_spec("ptxrun") is None:
        return f"ptxrun is not at {_SHARED}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if shutil.which("g++") is None:
        return "no g++"
    return None


@pytest.fixture
def triton_runs():
    """``with triton_runs(arch=90, check=True, **configured) as record``: Triton kernels launched
    inside run on CPU tensors, checked for races and wrong addresses.
    """
    reason = _missing()
    if reason is not None:
        pytest.skip(reason)
    import ptxrun
    import ptxrun.triton_driver

    @contextlib.contextmanager
    def runs(arch=90, check=True, **configured):
        with (
            ptxrun.triton_driver.installed(arch=arch),
            ptxrun.configured(**configured),
            ptxrun.recording(check=check) as record,
        ):
            yield record
        if check:
            faults = record.races + record.out_of_range + record.misaligned
            assert not faults + record.uninitialised, "\n".join(record.messages)

    return runs
