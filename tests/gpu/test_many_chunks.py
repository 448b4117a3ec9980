"""More chunks than `refine` runs side by side, compiled, and as many as one long sequence has."""

import pytest
import torch
from core.test_many_chunks import (  # noqa: F401
    test_chaotic_cell_equals_loop,
    test_equals_loop,
    test_iterations_that_count,
    test_nan_reaches_what_the_loop_reaches,
    test_packed_equals_one_by_one,
    test_resets_equal_loop,
    test_same_bits,
)

from pararnn import RNN, Newton
from pararnn.cells import ParaGRUCell
from pararnn.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_the_gpu"),
    pytest.mark.filterwarnings("ignore:.*determinis"),
]


@pytest.mark.parametrize("bias", [0.0, 5.0, 9.0])
def test_one_long_sequence_equals_one_chunk(bias):
    """Every tenth channel forgets over 150 steps, or over 8,000."""
    torch.manual_seed(0)
    cell, time = ParaGRUCell(64, 64).to(torch.bfloat16), 2**15
    x = torch.randn(1, time, 64, dtype=torch.bfloat16)
    cotangent = torch.randn(1, time, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        cell.bias[0, ::10] -= bias
    found = []
    for solver in (None, Newton(chunk=time)):
        rnn, given = RNN(cell, backend="triton", solver=solver), x.clone().requires_grad_()
        y, _ = rnn(given)
        found.append((y, *torch.autograd.grad(y, [given, *cell.parameters()], cotangent)))
        if solver is None:
            assert rnn.report.chunks > 16
            assert rnn.report.iterations <= 4  # two corrections, and `refine` for what they leave
    for n, (actual, expected) in enumerate(zip(*found, strict=True)):
        assert_close(f"number {n}", actual, expected, rtol=2e-2)
