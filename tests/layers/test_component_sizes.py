"""States whose components differ in size, against the loop."""

import copy

import pytest
import torch
from torch import nn

import pararnn
from pararnn.testing import assert_close, check_cell, loop


class Rssm(nn.Module):
    """A deterministic and a latent state, of 8 and 4 channels."""

    num_components = 2

    def __init__(self, hidden_size=(8, 4), latent=4):
        super().__init__()
        self.input_size, self.hidden_size = 3, hidden_size
        self.gru, self.prior = nn.GRUCell(4 + 3, 8), nn.Linear(8, latent)

    def forward(self, x, state):
        h, z = state
        h = self.gru(torch.cat([x, z], -1), h)
        return h, torch.tanh(self.prior(h))


class Differing(nn.Module):
    """Three components, the last of one channel."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.rand(6))

    def forward(self, x, state):
        a, b, c = state
        total = a.mean(-1, keepdim=True) + b.sum(-1, keepdim=True) + c
        return (
            torch.tanh(self.decay * a + x + b.sum(-1, keepdim=True)),
            0.3 * b + x[:, :2] * c,
            torch.sin(total),
        )


CELLS = {"rssm": (Rssm, (8, 4), 3), "differing": (Differing, (6, 2, 1), 6)}


@pytest.fixture(params=CELLS)
def case(request):
    """A cell, its state and one for resets, and x."""
    kind, sizes, features = CELLS[request.param]
    draw = lambda *s: torch.randn(s, dtype=torch.float64, requires_grad=True)  # noqa: E731
    states = [tuple(draw(3, n) for n in sizes) for _ in range(2)]
    return kind().double(), *states, draw(3, 40, features)


SOLVERS = {
    "chosen": None,
    "Newton": pararnn.Newton(chunk=7),
    "Jacobi": pararnn.Jacobi(chunk=8),
    "Sequential": pararnn.Sequential(),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("with_resets", [False, True])
def test_equals_the_loop(case, solver, with_resets):
    cell, state, fresh, x = case
    resets = torch.rand(3, 40) < 0.1 if with_resets else None
    options = {"resets": resets, "reset_state": fresh if with_resets else None}
    rnn = pararnn.RNN(cell, solver=SOLVERS[solver])
    found, expected = rnn(x, state, **options), loop(cell, x, state, **options)
    assert rnn.state_shapes == tuple(s.shape[1:] for s in state)
    inputs = [x, *state, *(fresh if with_resets else ()), *cell.parameters()]
    flat = [(y, *last) for y, last in (found, expected)]
    cotangents = [torch.randn_like(t) for t in flat[0]]
    grads = [torch.autograd.grad(tensors, inputs, cotangents) for tensors in flat]
    for i, (a, b) in enumerate(zip(*flat, strict=True)):
        assert_close(f"value {i}", a, b, rtol=1e-10)
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_close(f"gradient {i}", a, b, rtol=1e-9)


def test_steps_pieces_and_packed_sequences(case):
    cell, state, _, x = case
    rnn = pararnn.RNN(cell)
    whole, last = rnn(x, state)
    y, middle = rnn(x[:, :13], state)
    rest, again = rnn(x[:, 13:], middle)
    assert_close("pieces", torch.cat([y, rest], 1), whole, rtol=1e-10)
    assert [s.shape for s in again] == [s.shape for s in state]
    now = state
    for t in range(5):
        y, now = rnn.step(x[:, t], now)
        assert_close("step", y, whole[:, t], rtol=1e-10)
    lengths, row = [15, 0, 25], x[:1]
    ends = torch.tensor([0, 15, 15, 40])
    packed, ended = rnn(row, state, cu_seqlens=ends)
    for i, part in enumerate(row.split(lengths, 1)):
        own = tuple(s[i : i + 1] for s in state)
        if lengths[i]:
            y, own = rnn(part, own)
            assert_close("packed", packed[:, ends[i] : ends[i + 1]], y, rtol=1e-10)
        for found, expected in zip(ended, own, strict=True):
            assert_close("state", found[i : i + 1], expected, rtol=1e-10)
    assert_close("last", last[1], again[1], rtol=1e-10)


def test_sizes_are_said_or_found():
    x, state = torch.randn(2, 9, 3), (torch.randn(2, 8), torch.randn(2, 4))
    cell = Rssm()
    expected = pararnn.RNN(cell)(x, state)[0]
    cell.hidden_size = 8
    for rnn in (pararnn.RNN(cell), pararnn.RNN(cell, hidden_size=(8, 4))):
        assert torch.equal(rnn(x, state)[0], expected)
        assert (rnn.hidden_size, rnn.num_components, rnn.state_shapes) == (8, 2, ((8,), (4,)))
        assert torch.equal(copy.deepcopy(rnn)(x, state)[0], expected)
        assert rnn(x[0])[1][1].shape == (4,)
    compiled = torch.compile(pararnn.RNN(cell), backend="eager", fullgraph=True)
    assert_close("compiled", compiled(x, state)[0], expected, rtol=1e-5)


def test_what_looks_into_cells():
    cell = Rssm().double()
    assert check_cell(cell).structure == "dense"
    rnn = pararnn.RNN(cell)
    assert "components have 8 and 4 channels" in str(pararnn.explain(rnn))
    found = pararnn.diagnose(rnn, torch.randn(2, 30, 3, dtype=torch.float64))
    assert found.lyapunov_exponent < 0


def test_mistakes():
    x = torch.randn(2, 9, 3)
    zeros = lambda *sizes: tuple(torch.zeros(2, n) for n in sizes)  # noqa: E731
    rnn = pararnn.RNN(Rssm(8))
    with pytest.raises(ValueError, match=r"2 components had 8 channels each; if they differ, set"):
        rnn(x)
    with pytest.raises(ValueError, match=r"Its state had tensors of shape \(N, 8\) and \(N, 5\)"):
        rnn(x, zeros(8, 5))
    assert rnn(x, zeros(8, 4))[0].shape == (2, 9, 8)
    with pytest.raises(
        ValueError, match=r"component 1 of state has shape \(2, 5\) but .* \(2, 4\)"
    ):
        rnn(x, zeros(8, 5))
    with pytest.raises(
        ValueError, match=r"a tuple of 2 tensors of shape \(2, 8\) and \(2, 4\), got"
    ):
        rnn(x, zeros(8)[0])
    with pytest.raises(ValueError, match=r"hidden_size is \(8, 4, 3\) for 2 components; give"):
        pararnn.RNN(Rssm((8, 4, 3)))
    with pytest.raises(
        ValueError, match=r"component 1 of shape \(3, 5\) for one of shape \(3, 4\)"
    ):
        pararnn.RNN(Rssm(latent=5))
