"""
Tests run everywhere. Where there is no GPU with FP8 tensor cores, the Triton kernels run in Triton's interpreter.
"""

import os

import pytest
import torch

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
if not ON_HOPPER:
    os.environ["TRITON_INTERPRET"] = "1"   # read by triton when it is imported

DEVICE = "cuda" if ON_HOPPER else "cpu"    # where the kernels run


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU of compute capability 9.0 or newer")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not ON_HOPPER:
            item.add_marker(pytest.mark.skip(reason="needs a GPU of compute capability 9.0 or newer"))


@pytest.fixture(scope="module")
def one_thread():
    """For tests of tiny tensors: on a busy machine a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
