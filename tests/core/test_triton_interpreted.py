"""The generated Triton in Triton's interpreter, on short sequences: the table on a GPU is longer.

`tests/gpu` runs the whole table of `test_contracts` with compiled kernels.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pararnn import RNN, Newton
from pararnn.kernels import facts
from pararnn.kernels.triton.backend import TritonBackend
from pararnn.kernels.triton.build import too_old
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import decide
from pararnn.testing import assert_close, loop

from .cells import CELLS, make_cell
from .compare import RTOL, as_tuple, assert_same, one_by_one, outcome, random_state, with_resets
from .conftest import needs_triton

pytestmark = needs_triton


def layer(name, dtype=torch.float64, chunk=3):
    return RNN(make_cell(name, dtype), backend="triton", solver=Newton(chunk=chunk))


def data(rnn, batch=2, time=8, dtype=torch.float64):
    x = torch.randn(batch, time, rnn.cell.input_size, dtype=dtype)
    return x, random_state(rnn.num_components, batch, rnn.hidden_size, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in CELLS), ("paralstm", torch.float32)],
    ids=str,
)
def test_equals_loop(name, dtype):
    """Three chunks, the last of two steps."""
    rnn = layer(name, dtype)
    x, state = data(rnn, dtype=dtype)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, RTOL[dtype])


@pytest.mark.parametrize("name", CELLS)
def test_resets_equal_loop(name):
    rnn = layer(name)
    x, state = data(rnn)
    resets = torch.rand(x.shape[:2]) < 0.15
    resets[1, -1] = resets[1, 2:5] = True
    resets[:, 0] = torch.tensor([True, False])
    both = (*as_tuple(state), *as_tuple(data(rnn)[1]))
    expected = outcome(with_resets(functools.partial(loop, rnn.cell), resets), rnn.cell, x, both)
    assert_same(outcome(with_resets(rnn, resets), rnn.cell, x, both), expected, 1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 40], ids="chunk={}".format)
@pytest.mark.parametrize("time", [1, 2, 13])
def test_lengths_and_chunks(time, chunk):
    """More chunks than a group, one step, one chunk."""
    rnn = layer("paralstm", chunk=chunk)
    x, state = data(rnn, batch=1, time=2 * time if chunk == 1 else time)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)


@pytest.mark.parametrize("chunk", [4, 40], ids="chunk={}".format)
def test_packed_equals_one_by_one(chunk):
    rnn = layer("heads", chunk=chunk)
    lengths = [0, 1, 6, 0, 2, 5, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, _ = data(rnn, batch=1, time=sum(lengths))
    state = random_state(2, len(lengths), rnn.hidden_size)

    expected = outcome(one_by_one(rnn.cell, lengths), rnn.cell, x, state)
    actual = outcome(lambda x, s: rnn(x, s, cu_seqlens=bounds), rnn.cell, x, state)
    assert_same(actual, expected, 1e-12)


@pytest.mark.parametrize("starts", ["none", "resets", "packed"])
@pytest.mark.parametrize("chunk", [5, 4, 3], ids="chunk={}".format)
def test_the_end_of_the_last_chunk_is_not_looked_for(monkeypatch, chunk, starts):
    """Of two or three chunks that do not forget, `sweep` runs the first, and the one between."""
    from pararnn.kernels.triton import solve  # needs Triton

    costs = replace(COSTS, triton_warm_up=(1, 1, 1), most_unroll=2)
    monkeypatch.setattr(facts, "decide", functools.partial(decide, costs=costs))
    swept = []

    def run(_self, calls, launcher):
        for call in calls:
            call.launch(launcher)
            if call.kernel is solve.sweep:
                edges = call.arguments["edges"]
                swept.append([t.clone() for t in (edges.stored, edges.guess, edges.ends)])

    monkeypatch.setattr(TritonBackend, "_run", run)
    rnn, lengths = layer("slow_gates", chunk=chunk), [0, 5, 1, 2]
    x, state = data(rnn, batch=1)
    expect, call = functools.partial(loop, rnn.cell), rnn
    if starts == "resets":
        resets = torch.zeros(1, 8, dtype=torch.bool)
        resets[0, [2, 6]] = True
        state = (*as_tuple(state), *as_tuple(data(rnn, batch=1)[1]))
        expect, call = with_resets(expect, resets), with_resets(rnn, resets)
    if starts == "packed":
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        state = random_state(rnn.num_components, len(lengths), rnn.hidden_size)
        expect = one_by_one(rnn.cell, lengths)
        call = lambda x, s: rnn(x, s, cu_seqlens=bounds)  # noqa: E731
    expected = outcome(expect, rnn.cell, x, state)
    assert_same(outcome(call, rnn.cell, x, state), expected, 1e-12)
    assert len(swept) == 2
    for backward, (stored, *edges) in enumerate(swept):
        guess, ends = (t.flip(1) if backward else t for t in edges)
        stored = stored.flip(1) if backward else stored
        assert stored[0, 0].all()
        if starts == "none":
            assert not stored[0, 1:].any()
            assert torch.equal(ends[:, -1], guess[:, -1])
            assert not (ends == guess)[:, :-1].all(-1).any()


def test_several_blocks_of_channels_and_layouts():
    """Channels beyond one block, time first, and a gradient that is a broadcast scalar."""
    torch.manual_seed(0)
    from pararnn.cells import ParaGRUCell

    cell = ParaGRUCell(3, 70).double()
    rnn = RNN(cell, backend="triton", solver=Newton(chunk=4), batch_first=False)
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = rnn(x)
    expected, _ = loop(cell, x.transpose(0, 1), x.new_zeros(2, 70))
    assert_close("y", y.transpose(0, 1), expected, rtol=1e-12)
    ours = torch.autograd.grad(y.sum(), [x, *cell.parameters()])
    theirs = torch.autograd.grad(expected.sum(), [x, *cell.parameters()])
    for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"gradient {i}", a, e, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("slow_gates", torch.bfloat16), ("exponential", torch.bfloat16), ("paralstm", torch.float16)],
    ids=str,
)
def test_half_precision(name, kind):
    rnn = layer(name, kind)
    x, state = data(rnn, dtype=kind)
    actual = outcome(rnn, rnn.cell, x, state)
    single = make_cell(name, kind).float()
    state = tuple(s.float() for s in as_tuple(state))
    state = state if len(state) > 1 else state[0]
    expected = outcome(functools.partial(loop, single), single, x.float(), state)
    rtol = 16 * torch.finfo(kind).eps
    assert_same(actual, {n: v.to(kind) for n, v in expected.items()}, rtol)


def test_steps_equal_the_whole():
    rnn = layer("paralstm")
    x, state = data(rnn, time=5)
    y, last = rnn(x, state)
    for t, x_t in enumerate(x.unbind(1)):
        y_t, state = rnn.step(x_t, state)
        assert_close(f"step {t}", y_t, y[:, t], rtol=1e-12)
    for a, e in zip(state, last, strict=True):
        assert_close("last", a, e, rtol=1e-12)


def test_source_is_deterministic_and_shows_the_equations():
    first, second = (
        TritonBackend(RNN(make_cell("paragru")).runner().traced.step.recurrence).source()
        for _ in range(2)
    )
    assert first == second
    assert "z = sigmoid(a_z * h + x_z)" in first.split('"""')[1]
    steps = ("step", "step_with_jacobian", "adjoint_step", "adjoint_with_jacobian")
    assert all(f"def {name}(state, drive, coefficient" in first for name in steps)
    assert all(f"pararnn.kernels.triton.{name}" in first for name in ("forward", "adjoint"))


def test_kernels_compile_for_an_h100_side_by_side(tmp_path):
    """All of a direction before the first of them is launched; a GPU is not needed for that."""
    if words := too_old():
        pytest.skip(words)
    settings = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    script = Path(__file__).with_name("compiled_for_gpu.py")
    command = [sys.executable, str(script)]
    printed = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    found = json.loads(printed.stdout)
    direction = ["sweep", "correct", "refine"]
    assert found["launched"] == [*direction, *direction, "total"]
    assert found["together"] == ([3, 3, 0] if found["threads"] else [0, 0, 0])
    assert found["compiled"] == 7
    assert found["confused"] == [], "Triton 3.6 takes functions for one that differ"
    assert found["changed"], "Triton would load kernels of other functions from its cache"


def test_triton_without_a_gpu_says_how(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"on the CPU, where Triton runs with TRITON_INTERPRET=1"):
        layer("paragru")
