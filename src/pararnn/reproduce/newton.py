"""The paper's iteration as it is printed (Danieli et al. 2025, Algorithm 1), in plain PyTorch.

It is here to show residuals of every iteration. The library's own solvers start from a warm-up.

    guess     h_l = f(0, x_l)
    residual  r_l = f(h_{l-1}, x_l) - h_l
    solve     d_l = J_l d_{l-1} + r_l,   J_l = df/dh at h_{l-1},   by log2(L) reductions
    update    h_l = h_l + d_l

Shapes: N components of the state, B batch, L steps, H channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def residuals(cell: nn.Module, x: Tensor, iterations: int) -> list[float]:
    """Largest residual before the first iteration and after each.

    Args:
        cell: Elementwise: `forward(x, state) -> state`, with one component (rows, H) or a tuple.
        x: Inputs, (B, L, features).
        iterations: Of Newton's method.
    """
    h_NBLH = _step(cell, x, None)
    found = []
    for _ in range(iterations):
        before = _shifted(h_NBLH)
        r_NBLH, jac_NNBLH = _linearised(cell, x, before)
        r_NBLH = r_NBLH - h_NBLH
        found.append(float(r_NBLH.abs().amax()))
        h_NBLH = h_NBLH + _reduced(jac_NNBLH, r_NBLH)
    last = _step(cell, x, _shifted(h_NBLH)) - h_NBLH
    return [*found, float(last.abs().amax())]


def _step(cell: nn.Module, x: Tensor, before_NBLH: Tensor | None) -> Tensor:
    """All steps at once from the states before them; from zero when None. (N, B, L, H)."""
    batch, time = x.shape[:2]
    rows = x.flatten(0, 1)
    size: Any = cell.hidden_size
    if before_NBLH is None:
        count = int(getattr(cell, "num_components", 1))
        parts = [x.new_zeros(batch * time, size) for _ in range(count)]
    else:
        parts = [part.flatten(0, 1) for part in before_NBLH]
    new = cell(rows, tuple(parts) if len(parts) > 1 else parts[0])
    new = new if isinstance(new, tuple) else (new,)
    return torch.stack([part.unflatten(0, (batch, time)) for part in new])


def _linearised(cell: nn.Module, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Steps (N, B, L, H) and Jacobians (N, N, B, L, H): one gradient for each component."""
    with torch.enable_grad():
        before = before.detach().requires_grad_()
        value = _step(cell, x, before)
        rows = [torch.autograd.grad(v.sum(), before, retain_graph=True)[0] for v in value]
    jac = torch.stack(rows)
    jac[:, :, :, 0] = 0  # nothing comes before the first step
    return value.detach(), jac


def _reduced(jac: Tensor, r: Tensor) -> Tensor:
    """The solution of `d_l = J_l d_{l-1} + r_l` by recursive doubling (Algorithm 1b)."""
    stride, time = 1, r.shape[2]
    while stride < time:
        earlier = r[:, :, :-stride]
        late = jac[:, :, :, stride:]
        moved = torch.einsum("nmblh,mblh->nblh", late, earlier)
        product = torch.einsum("nmblh,mkblh->nkblh", late, jac[:, :, :, :-stride])
        r = torch.cat([r[:, :, :stride], r[:, :, stride:] + moved], 2)
        jac = torch.cat([torch.zeros_like(jac[:, :, :, :stride]), product], 3)
        stride *= 2
    return r


def _shifted(h_NBLH: Tensor) -> Tensor:
    """The state before every step."""
    return F.pad(h_NBLH, (0, 0, 1, 0))[:, :, :-1]
