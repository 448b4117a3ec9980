"""Numbers below the normal ones of a format: in C they are what they are in PyTorch."""

import pytest
import torch
from torch import nn

from pararnn import RNN
from pararnn.testing import loop

TINY = {torch.float32: 1e-40, torch.float64: 1e-310}


class Scaled(nn.Module):
    """Channels mix; an eps keeps 0 / 0 away."""

    input_size = hidden_size = 4
    num_components = 1

    def __init__(self, eps, dtype):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0].to(dtype))

    def forward(self, x, h):
        v = h @ self.weight
        return 0.5 * v / (v.abs() + self.eps) + x


class Turned(Scaled):
    """States stay as small as they begin."""

    def forward(self, x, h):
        return h @ self.weight + x


class ScaledAlone(Scaled):
    """Channels do not mix."""

    def forward(self, x, h):
        return 0.5 * h * self.weight[0] / (h.abs() + self.eps) + x


def outcome(run, cell, x, first):
    given = [t.detach().clone().requires_grad_() for t in (x, first)]
    y, last = run(*given)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    wanted = [*given, cell.weight]
    grads = torch.autograd.grad((y * cotangent).sum() + last.sum(), wanted, allow_unused=True)
    return [
        y.detach(),
        *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)),
    ]


@pytest.mark.parametrize("dtype", TINY)
@pytest.mark.parametrize("kind", [Scaled, Turned, ScaledAlone])
def test_they_are_not_taken_as_zero(kind, dtype):
    eps = TINY[dtype]
    cell = kind(eps, dtype)
    x = torch.zeros(2, 9, 4, dtype=dtype)
    x[1, 3] = eps * torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64).to(dtype)
    first = torch.zeros(2, 4, dtype=dtype)
    rnn = RNN(cell, backend="c")
    found = outcome(rnn, cell, x, first)
    expected = outcome(lambda x, h: loop(cell, x, h), cell, x, first)
    assert rnn.plan(x.shape).backend == "c"
    assert all(t.isfinite().all() for t in expected[:1])
    assert expected[0][1, 3:].abs().amin(1).gt(0).all()
    rtol = 1e-6 if kind is not Turned else 0.0
    for one, wanted in zip(found[:1], expected[:1], strict=True):
        # tiny numbers have few digits: compared by the smallest of them
        spacing = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        torch.testing.assert_close(one, wanted, rtol=rtol or 1e-6, atol=8 * spacing)
    for one, wanted in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(one.isfinite(), wanted.isfinite())
        finite = wanted.isfinite()
        torch.testing.assert_close(one[finite], wanted[finite], rtol=1e-5, atol=1e-30)


def test_adjoints_that_fall_that_low_are_lost_alone():
    """Those above are as in the loop."""
    cell = nn.RNNCell(3, 4, bias=False).double()
    x = torch.randn(2, 3000, 3, dtype=torch.float64)
    rnn = RNN(cell, backend="c")
    grads = []
    for run in (rnn, lambda x: loop(cell, x, torch.zeros(2, 4, dtype=torch.float64))):
        given = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(given)[0][:, -1].sum(), given)[0])
    assert grads[1][:, 0].abs().max() < 1e-308  # the loss is far enough away
    sizes = grads[1].abs().amax(-1, keepdim=True)
    assert ((grads[0] - grads[1]).abs() <= 1e-9 * sizes + 1e-300).all()
