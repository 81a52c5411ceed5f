import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is full of NaN, so that what a kernel forgets to write is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small calls: on a busy machine two threads wait longer than they work.

    What depends on the number of threads has tests of its own, which set it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
