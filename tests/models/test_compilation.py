"""torch.compile sees the blocks of a model as one and the same."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from pararnn.lm.models import CELLS
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.config import ExecutionConfig
from pararnn.lm.training.initial import blocks
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.sharding import lay_out


class OwnCell(nn.Module):
    """Somebody's cell, which does not say the size of its input."""

    def __init__(self, input_size, hidden_size, num_heads):
        super().__init__()
        self.hidden_size = hidden_size
        self.project = nn.Linear(input_size, hidden_size)

    def forward(self, x, h):
        return torch.tanh(0.5 * h + self.project(x))


@pytest.fixture(params=["paragru", "paralstm", "own"])
def cell(request, monkeypatch):
    monkeypatch.setitem(CELLS, "own", OwnCell)
    return request.param


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("recomputed", ["off", "on"])
def test_all_blocks_share_one_graph(make_model, tokens, cell, recomputed, monkeypatch):
    """Otherwise every block is compiled anew, and from the ninth on none is."""
    counter, compile_block = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_block(f, backend=counter))
    loss = CausalLoss(make_model(cell=cell, num_hidden_layers=3))
    assert len(blocks(loss.model)) == 3
    execution = ExecutionConfig(activation_checkpointing=recomputed, compile=True)
    lay_out(loss, execution, Processes(0, 1, torch.device("cpu")))
    loss.compiled = False  # this counts blocks
    loss(tokens, tokens)[0].backward()
    assert counter.frame_count == 1
