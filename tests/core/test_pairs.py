"""Inputs in half precision that kernels of elementwise cells load in pairs, in the interpreter."""

import pytest
import torch

from pararnn import RNN, Newton
from pararnn.cells import ParaGRUCell, ParaLSTMCell, SLSTMCell

from .compare import as_tuple
from .conftest import needs_triton

pytestmark = needs_triton

CELLS = {
    "gru": lambda size: ParaGRUCell(3, size),
    "lstm": lambda size: ParaLSTMCell(3, size),
    "slstm": lambda size: SLSTMCell(3, size),
}


def results(cell, size, dtype, chunk, resets):
    """What a layer computes, and its gradients."""
    torch.manual_seed(0)
    rnn = RNN(CELLS[cell](size).to(dtype), backend="triton", solver=Newton(chunk=chunk))
    x = torch.randn(2, 13, 3, dtype=dtype, requires_grad=True)
    more = {"resets": torch.rand(2, 13) < 0.2} if resets else {}
    y, last = rnn(x, **more)
    given = [y, *as_tuple(last)]
    torch.autograd.backward(given, [torch.randn_like(t) for t in given])
    return [y, x.grad, *(p.grad for p in rnn.parameters())]


@pytest.mark.parametrize("resets", [False, True], ids="resets={}".format)
@pytest.mark.parametrize("chunk", [4, 40], ids="chunk={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cell", "size"), [("gru", 2), ("gru", 66), ("lstm", 6), ("slstm", 10)])
def test_pairs_change_nothing(cell, size, dtype, chunk, resets, monkeypatch):
    """Bit by bit, with channels that fill a block or do not."""
    from pararnn.kernels.triton import launch

    kinds, found = launch.paired_of, []
    monkeypatch.setattr(launch, "paired_of", lambda given: found.append(kinds(given)) or found[-1])
    paired = results(cell, size, dtype, chunk, resets)
    assert set(map(str, found)) == {{torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]}
    monkeypatch.setattr(launch, "paired_of", lambda _: None)
    for a, b in zip(paired, results(cell, size, dtype, chunk, resets), strict=True):
        assert torch.equal(a, b)


def test_only_what_lies_in_pairs_is_loaded_in_pairs():
    from pararnn.kernels.triton.launch import paired_of
    from pararnn.kernels.triton.tuples import Given, InHeads

    def given(drive, state):
        drives = (
            InHeads(drive, drive.stride(0), drive.stride(1), drive.stride(2), drive.shape[3]),
        )
        return Given(drives, (), None, (), (state,), ())

    room = torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16)
    state = torch.zeros(2, 5, 24, dtype=torch.bfloat16)
    assert paired_of(given(room, state)) is not None
    assert paired_of(given(room[..., 2:], state)) is not None
    assert paired_of(given(room[..., 1:7], state)) is None  # from an odd place
    assert paired_of(given(room[..., :7], state)) is None  # of odd size
    assert paired_of(given(torch.zeros(2, 5, 3, 9).to(room)[..., :8], state)) is None
    assert paired_of(given(room, state.float())) is None
    assert paired_of(given(room.float(), state.float())) is None
