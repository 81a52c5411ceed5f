import os

import pytest
import torch

from kdkernels._ext import cpp_error


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Both implementations. A build that is demanded and missing fails instead of being skipped."""
    error = cpp_error()
    if request.param == "cpp" and error and not os.environ.get("KDKERNELS_REQUIRE_BUILD"):
        pytest.skip(f"the C++ library is not built ({error})")
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
