"""torch.compile sees the blocks of a model as one and the same."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pararnn.models.causal_loss import CausalLoss
from pararnn.training.config import ExecutionConfig
from pararnn.training.initial import blocks
from pararnn.training.parallel import Processes
from pararnn.training.sharding import lay_out


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("recomputed", [False, True])
def test_all_blocks_share_one_graph(make_model, tokens, cell, recomputed, monkeypatch):
    """Otherwise every block is compiled anew, and from the ninth on none is."""
    counter, compile_block = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_block(f, backend=counter))
    torch.compiler.reset()
    loss = CausalLoss(make_model(cell=cell, num_hidden_layers=3))
    assert len(blocks(loss.model)) == 3
    execution = ExecutionConfig(activation_checkpointing=recomputed, compile=True)
    lay_out(loss, execution, Processes(0, 1, torch.device("cpu")))
    loss.compiled = False  # this counts blocks
    loss(tokens, tokens)[0].backward()
    assert counter.frame_count == 1
