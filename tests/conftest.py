"""Tests run everywhere. Without a GPU of compute capability 9.0, kernels run in Triton's interpreter."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
if not ON_HOPPER:
    os.environ["TRITON_INTERPRET"] = "1"   # read by triton when it is imported

import autoscale     # now, and with them triton
import gemm_kernel
import microscale

DEVICE = "cuda" if ON_HOPPER else "cpu"    # where the kernels run
needs_triton = pytest.mark.skipif(not microscale.HAS_TRITON, reason="Triton is not installed")
needs_muon = pytest.mark.skipif(autoscale.MUON is None, reason="PyTorch has Muon from 2.9 on")
for_devices = pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU of compute capability 9.0 or newer")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not ON_HOPPER:
            item.add_marker(pytest.mark.skip(reason="needs a GPU of compute capability 9.0 or newer"))


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """Return {name: Future} of what tests wait for in other processes: in the BESIDE of their files, {part of
    a test's name: function of a folder}. What the chosen tests need runs from the first test on, one after
    another, because they and the tests leave a core idle each."""
    wanted = {name: job for item in request.session.items
              for name, job in getattr(item.module, "BESIDE", {}).items() if name in item.name}
    pool = ThreadPoolExecutor(max_workers=1)
    yield {name: pool.submit(job, tmp_path_factory.mktemp("beside")) for name, job in wanted.items()}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def eager(request):
    """Compile in tests marked gpu alone. Beside a GPU all would, for minutes, what runs on CPUs as well."""
    compiles = request.node.get_closest_marker("gpu")
    with torch.compiler.set_stance("default" if compiles else "force_eager"):
        yield


def let_kernels_run(run, monkeypatch):
    """Run the kernels on every device, on a CPU in Triton's interpreter; or on none."""
    for module in (autoscale, gemm_kernel, microscale):
        monkeypatch.setattr(module, "kernels_run_on", lambda _: run)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_triton)], ids=["pytorch", "kernels"])
def kernels(request, monkeypatch):
    """Run the test without kernels, and with them."""
    let_kernels_run(request.param, monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """For tests of tiny tensors: on a busy machine a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
