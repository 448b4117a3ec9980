"""Fixtures of every test: fixed seeds, one thread, and nothing kept by the compiler."""

import atexit
import gc
import os
import sys
import warnings

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which then keeps its mode
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


gc.disable()  # until all is imported: there is no garbage, and to look for it takes seconds


def pytest_collection_finish():
    gc.freeze()
    atexit.register(gc.unfreeze)  # what is left at exit would count as leaked
    gc.set_threshold(20_000, 20, 100)  # of 700, 10, 10: a tenth of the time goes into looking
    gc.enable()


def pytest_xdist_auto_num_workers():
    """Where there are many processors, most of the time would go into starting workers."""
    return min(os.cpu_count() or 1, 8)


@pytest.fixture(scope="session", autouse=True)
def prepared_interpreter():
    """See `triton_interpreter`."""
    if os.environ.get("TRITON_INTERPRET") == "1" and sys.platform == "linux":
        import triton_interpreter

        triton_interpreter.prepare()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are tiny here: on a busy machine threads that wait for each other cost far more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forgetful_compiler():
    """Graphs that torch.compile made for one test do not count towards its limit in the next."""
    yield
    if "torch._dynamo" in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where there is a GPU, it imports all of Inductor
            torch.compiler.reset()


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels, for this test alone."""
    monkeypatch.setenv("PARARNN_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"
