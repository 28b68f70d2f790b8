"""
Tests run everywhere. Where there is no GPU with FP8 tensor cores, the Triton kernels run in Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="session", autouse=True)
def compilation(request, tmp_path_factory):
    """The process that compiles every kernel for test_hopper.py, which will wait for it: it begins with the first test,
    because compiler and tests take a core each. None where that test is not to run."""
    if not any(item.name.startswith("test_all_kernels_compile") for item in request.session.items):
        yield None
        return
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.update(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")),
                       PYTHONPATH=str(Path(__file__).parent.parent))
    process = subprocess.Popen([sys.executable, Path(__file__).with_name("test_hopper.py")], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def one_thread():
    """For tests of tiny tensors: on a busy machine a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
