"""Memories of the language models' mixers, alone, in the kernels of tiles (interpreted)."""

import pytest
import torch

from pararnn import cells

from .conftest import needs_triton
from .test_tiles import compare

pytestmark = needs_triton
KINDS = {
    "m2rnn": cells.M2RNNCell,
    "delta": cells.DeltaMemoryCell,
    "outer": cells.OuterMemoryCell,
    "gated_delta": cells.GatedDeltaCell,
    "mamba2": cells.Mamba2Cell,
}


@pytest.mark.parametrize("nonlinearity", ["tanh", "linear"])
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_all_have_kernels(name, shared_keys, nonlinearity):
    torch.manual_seed(0)
    sizes = None, 8, 4
    cell = KINDS[name](
        *sizes, num_heads=2, shared_keys=shared_keys, nonlinearity=nonlinearity, dtype=torch.float64
    )
    compare(cell)
