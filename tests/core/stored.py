"""Outputs and gradients of the contract table as numbers in a file, at values that never change.

What differs from the loop fails elsewhere. This holds the loop too: cells, types and all that is
drawn stay what they were. Random numbers come from bits of NumPy, which are the same in all
versions. Of every tensor are stored its norm, a product with random numbers, and two entries.
"""

import zlib

import numpy as np
import torch

from pararnn import RNN, Newton

from .cells import CELLS, HIDDEN, MATRICES
from .compare import as_tuple, joined, outcome, with_resets
from .test_mixing import MIXING

DIGITS = 9
KINDS = ("plain", "resets", "packed", "bfloat16")
BATCH, TIME, CHUNK = 3, 20, 6
DISCONTINUOUS = {"unusual", "partly"}  # rounding an input may change their states by anything
NAMES = [
    f"{cell} {kind}"
    for cell in (*CELLS, *(f"mixing_{name}" for name in MIXING), *MATRICES)
    for kind in KINDS
    if kind != "bfloat16" or cell.removeprefix("mixing_") not in DISCONTINUOUS
]


def uniform(name, shape):
    """Numbers between -1 and 1, the same for a name in all versions of everything."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return torch.from_numpy((bits >> 11) * 2.0**-52 - 1).reshape(shape)


def make(name, dtype):
    mixes = name.startswith("mixing_")
    cell = MIXING[name.removeprefix("mixing_")]() if mixes else (CELLS | MATRICES)[name]()
    with torch.no_grad():
        for key, tensor in (*cell.named_parameters(), *cell.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.6 * uniform(f"{name} {key}", tensor.shape))
        if name == "slow_gates":
            cell.input.bias[:HIDDEN] = -5.0
    return cell.to(dtype)


def outcome_of(name, backend="auto"):
    """Values and gradients of a cell and kind, on one backend."""
    cell_name, kind = name.split()
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float64
    cell = make(cell_name, dtype)
    rnn = RNN(cell, backend=backend, solver=Newton(chunk=CHUNK))
    draw = lambda key, like: uniform(f"{name} {key}", like.shape).to(like.dtype)  # noqa: E731
    batch, time, rows, run = BATCH, TIME, BATCH, rnn
    if kind == "packed":
        bounds = torch.tensor([0, 0, 1, 8, 8, 20])
        batch, rows = 1, len(bounds) - 1
        run = lambda x, state: rnn(x, state, cu_seqlens=bounds)  # noqa: E731
    x = uniform(f"{name} x", (batch, time, cell.input_size)).to(dtype)
    shapes = rnn.state_shapes * (2 if kind == "resets" else 1)
    state = joined(
        [uniform(f"{name} {i}", (rows, *shape)).to(dtype) for i, shape in enumerate(shapes)]
    )
    if kind == "resets":
        run = with_resets(rnn, uniform(f"{name} resets", (batch, time)) > 0.7)
        state = as_tuple(state)
    return outcome(run, cell, x, state, draw)


def numbers(name, tensor):
    """What is stored of a tensor."""
    tensor = tensor.double().flatten()
    found = [tensor.norm(), tensor @ uniform(name, tensor.shape), tensor[0], tensor[-1]]
    return [float(f"{float(value):.{DIGITS}g}") for value in found]


def contracts():
    """All that is stored, by cell, kind and value."""
    return {
        name: {key: numbers(key, value) for key, value in outcome_of(name).items()}
        for name in NAMES
    }
