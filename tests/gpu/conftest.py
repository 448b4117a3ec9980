"""Kernels compiled for the GPU, fresh memory filled with NaN."""

import pytest
import torch


@pytest.fixture
def on_the_gpu():
    """New tensors are on the GPU unless they say where."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def nan_filled():
    """As in the core tests; operations that are not deterministic on a GPU may only warn."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def any_backend():
    return "triton"


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.fixture
def backend_and_type(dtype):
    return "triton", dtype
