"""Tensors that move on by one entry, with Triton compiled for the GPU."""

import pytest
from core.test_moving import test_tensors_move_on  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]
