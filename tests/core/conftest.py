import sys

import pytest
import torch

# The extra `test` installs Triton on Linux: there a missing one fails.
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only")


@pytest.fixture(autouse=True)
def nan_filled():
    """`torch.empty` and its kin give NaN, so that an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "c"])
def backend(request):
    return request.param


@pytest.fixture(params=["torch", "c", pytest.param("triton", marks=needs_triton)])
def any_backend(request):
    """With Triton, which is interpreted here: for tests of few and short sequences."""
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


_PAIRS = [(b, t) for b in ("torch", "c") for t in (torch.float64, torch.float32)]
_PAIRS.append(pytest.param(("triton", torch.float32), marks=needs_triton))  # both on a GPU


@pytest.fixture(params=_PAIRS, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def backend_and_type(request):
    return request.param
