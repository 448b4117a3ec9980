import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled():
    """`torch.empty` and its kin give NaN, so that an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "c"])
def backend(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param
