"""A layer whose time is split over processes equals the layer, or the loop, on one."""

import functools
import itertools
import os
import signal
import time

import pytest
import torch
from core.cells import HIDDEN, INPUT
from core.compare import assert_same, joined, one_by_one, outcome, with_resets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pararnn import RNN, Newton
from pararnn.distributed import sequence_parallel
from pararnn.testing import loop

from . import jobs
from .group import Group
from .jobs import CELLS, FORGETTING, REMEMBERING, TIME

RTOL = 1e-12


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def state_of(name, rows):
    rnn = jobs.make_rnn(name)
    rnn(draw(1, 2, INPUT))
    return joined([draw(rows, *shape) for shape in rnn.state_shapes])


def looped(name, x):
    """Of a cell with one component, from zeros."""
    return loop(jobs.make_cell(name), x, x.new_zeros(len(x), HIDDEN))


def expected_of(run, module, x, state, renamed=("state",)):
    """Values and gradients of one process, and the cotangents that they were made with."""
    made = []

    def cotangent(_name, value):
        made.append(draw(*value.shape))
        return made[-1]

    found = outcome(run, module, x, state, cotangent)
    count = sum(name.startswith("last") for name in found)
    for old in [n for n in found if n.startswith("gradient of first")]:
        number = int(old.split("[")[1][:-1])
        name = f"{renamed[number // count]}[{number % count}]"
        found[f"gradient of {name}"] = found.pop(old)
    return found, made


def check(group, name, cuts, batch=2, **options):
    """One layer, with a state, on as many ranks as there are parts."""
    cell, x, state = jobs.make_cell(name), draw(batch, cuts[-1], INPUT), state_of(name, batch)
    expected, cotangents = expected_of(functools.partial(loop, cell), RNN(cell), x, state)
    make = functools.partial(jobs.make_rnn, name, **options)
    results = group.run(
        jobs.call, make, {"x": x, "state": state}, cuts, cotangents, count=len(cuts) - 1
    )
    assert_same(jobs.together(results), expected, RTOL)
    return results[0][1]


@pytest.mark.parametrize("cuts", [[0, 20, TIME], [0, 1, 14, 41, TIME]], ids=["two", "four"])
@pytest.mark.parametrize("name", CELLS)
def test_equals_one_process(group, name, cuts):
    check(group, name, cuts)


def test_a_cell_that_forgets_needs_one_iteration(group):
    """The warm-up is tried: what the ranks report is that it was good enough."""
    cuts = [0, 300, 600, 900, 1200]
    assert "4 chunks, 1 iteration," in check(group, "paragru", cuts, batch=1)


def test_a_cell_that_remembers_needs_few_iterations(group):
    found = check(group, "slow_gates", [0, 100, 200, 300, 400], batch=1)
    assert "4 chunks, 2 iterations" in found or "4 chunks, 3 iterations" in found


@pytest.mark.parametrize("backend", ["torch", "c"])
def test_backends_and_solvers(group, backend):
    check(group, "slow_gates", [0, 9, 23, 30, 61], backend=backend, solver=Newton(chunk=4))


def without_rows(group, rank, name):
    layer = sequence_parallel(jobs.make_rnn(name), group)
    x = torch.randn(0, 3 + rank, INPUT, dtype=torch.float64, requires_grad=True)
    y, last = layer(x)
    y.sum().backward()
    return y.shape, last.shape, x.grad.shape


@pytest.mark.parametrize("name", ["paragru", "slow_gates"])
def test_a_batch_without_rows(group, name):
    for rank, shapes in enumerate(group.run(without_rows, name)):
        time = 3 + rank
        assert shapes == ((0, time, HIDDEN), (0, HIDDEN), (0, time, INPUT))


@pytest.mark.parametrize("name", CELLS)
def test_one_rank_is_one_process(name, tmp_path):
    with Group(1, tmp_path) as alone:
        check(alone, name, [0, 23])


def test_segments(group):
    """Each rank cuts its own part into segments, which its backward pass runs again."""
    check(group, "slow_gates", [0, 9, 23, 30, 61], checkpoint_every=4)


@given(
    st.data(),
    st.sampled_from(CELLS),
    st.sampled_from([2, 4]),
    st.integers(1, 3),
    st.sampled_from(["nothing", "resets", "packed"]),
)
@settings(max_examples=25)
def test_any_split(group, data, name, count, batch, kind):
    cuts = data.draw(st.lists(st.integers(1, 39), min_size=count - 1, max_size=count - 1, unique=1))
    cuts = [0, *sorted(cuts), 40]
    if kind == "nothing":
        check(group, name, cuts, batch)
    elif kind == "resets":
        check_resets(group, name, cuts, batch)
    else:
        inner = data.draw(st.lists(st.integers(0, 40), max_size=5))
        check_packed(group, name, cuts, [0, *sorted(inner), 40])


def check_resets(group, name, cuts, batch):
    cell, x = jobs.make_cell(name), draw(batch, cuts[-1], INPUT)
    state, fresh = state_of(name, batch), state_of(name, batch)
    resets = torch.rand(batch, cuts[-1]) < 0.1
    both = [s if isinstance(s, tuple) else (s,) for s in (state, fresh)]
    run = with_resets(functools.partial(loop, cell), resets)
    names = ("state", "reset_state")
    expected, cotangents = expected_of(run, RNN(cell), x, (*both[0], *both[1]), names)
    make, arguments = functools.partial(jobs.make_rnn, name), {"x": x, "state": state}
    arguments |= {"resets": resets, "reset_state": fresh}
    results = group.run(jobs.call, make, arguments, cuts, cotangents, count=len(cuts) - 1)
    found = jobs.together(results)
    # without a reset nothing starts from reset_state, with one at the first step nothing from state
    zero = [n for n, v in expected.items() if "gradient of" in n and "state" in n and not v.any()]
    assert_same(found, expected, RTOL, zero)


def check_packed(group, name, cuts, ends):
    cell, x, state = jobs.make_cell(name), draw(1, cuts[-1], INPUT), state_of(name, len(ends) - 1)
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    expected, cotangents = expected_of(one_by_one(cell, lengths), RNN(cell), x, state)
    make = functools.partial(jobs.make_rnn, name)
    arguments = {"x": x, "state": state, "cu_seqlens": torch.tensor(ends)}
    results = group.run(jobs.call, make, arguments, cuts, cotangents, count=len(cuts) - 1)
    assert_same(jobs.together(results), expected, RTOL)


@pytest.mark.parametrize("name", [FORGETTING[0], REMEMBERING[0], "m2rnn", "chaotic"])
def test_resets(group, name):
    check_resets(group, name, [0, 12, 30, 31, TIME], 2)


@pytest.mark.parametrize("name", [FORGETTING[0], REMEMBERING[0], "m2rnn", "chaotic"])
def test_packed_sequences(group, name):
    """One crosses three ranks, one ends with a rank, some have no steps."""
    check_packed(group, name, [0, 12, 30, 31, TIME], [0, 0, 5, 12, 12, 40, 40, 47, TIME, TIME])


@pytest.mark.parametrize("name", ["paragru", "paralstm", "parallelized"])
@pytest.mark.parametrize("kind", ["nothing", "resets", "packed"])
def test_layers_in_both_directions(group, name, kind):
    batch = 1 if kind == "packed" else 2
    layer, x = jobs.make_stack(name), draw(batch, TIME, INPUT)
    ends = torch.tensor([0, 7, 20, 33, TIME])
    rows = len(ends) - 1 if kind == "packed" else batch
    state = joined([draw(4, rows, 4) for _ in range(2 if name == "paralstm" else 1)])
    more = {"resets": torch.rand(batch, TIME) < 0.1} if kind == "resets" else {}
    more |= {"cu_seqlens": ends} if kind == "packed" else {}
    expected, cotangents = expected_of(lambda x, s: layer(x, s, **more), layer, x, state)
    make = functools.partial(jobs.make_stack, name)
    arguments = {"x": x, "state": state, **more}
    results = group.run(jobs.call, make, arguments, [0, 20, 34, 35, TIME], cotangents)
    assert_same(jobs.together(results), expected, RTOL)


def test_time_first(group):
    cell, x, state = jobs.make_cell("paralstm"), draw(TIME, 2, INPUT), state_of("paralstm", 2)
    layer = RNN(cell, batch_first=False)
    expected, cotangents = expected_of(layer, layer, x, state)
    make = functools.partial(jobs.make_rnn, "paralstm", batch_first=False)
    arguments = ({"x": x, "state": state}, [0, 20, TIME], cotangents, {"axis": 0})
    results = group.run(jobs.call, make, *arguments, count=2)
    assert_same(jobs.together(results, 0), expected, RTOL)


def checkpointed(group, rank, x, cuts, kept):
    """A layer under activation checkpointing: its loss, gradients, and what is kept for them."""
    layer = sequence_parallel(jobs.make_rnn("slow_gates"), group)
    part = x[:, cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
    run = layer.forward if kept else functools.partial(checkpoint, layer, use_reentrant=False)
    y, last = run(part)
    total = y.square().sum() + last.sin().sum()
    found = torch.autograd.grad(total, [part, *layer.parameters()])
    return [total.detach().numpy(), *[f.numpy() for f in found]]


def test_activation_checkpointing(group):
    arguments = draw(2, TIME, INPUT), [0, 9, 20, 34, TIME]
    kept, again = (group.run(checkpointed, *arguments, kept) for kept in (True, False))
    assert all(isinstance(r, list) for r in (*kept, *again)), again
    for one, other in zip(kept, again, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def in_ddp(group, rank, x):
    """Mean losses of parts of one length, and the gradients that DDP has averaged."""
    layer = jobs.make_rnn("slow_gates")
    model = DistributedDataParallel(sequence_parallel(layer, group), process_group=group)
    y, _ = model(x.chunk(group.size(), 1)[rank])
    y.square().mean().backward()
    return [p.grad.numpy() for p in layer.parameters()]


def test_distributed_data_parallel(group):
    x = draw(2, 40, INPUT)
    cell = jobs.make_cell("slow_gates")
    loop(cell, x, x.new_zeros(2, HIDDEN))[0].square().mean().backward()
    for found in group.run(in_ddp, x):
        for gradient, parameter in zip(found, cell.parameters(), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(gradient), parameter.grad, rtol=1e-11, atol=1e-16
            )


def in_a_type(group, rank, name, dtype, x, autocasts):
    """A layer in another type than float64, and under autocast."""
    layer = sequence_parallel(jobs.make_rnn(name).to(dtype), group)
    part = x.to(dtype).chunk(group.size(), 1)[rank].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        y, last = layer(part)
    (y.float().square().sum() + last[0].float().sum()).backward()
    assert y.dtype is dtype
    assert part.grad.dtype is dtype
    return y.detach().float().numpy(), part.grad.float().numpy()


@pytest.mark.parametrize("name", ["paralstm", "slow_gates", "gru"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_other_types(group, name, kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x = draw(2, 40, INPUT).to(dtype)
    results = group.run(in_a_type, name, dtype, x, kind == "autocast")
    assert all(not isinstance(r[0], str) for r in results), results
    layer, whole = jobs.make_rnn(name).to(dtype), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y, last = layer(whole)
    (y.float().square().sum() + 4 * last[0].float().sum()).backward()
    tolerance = 1e-5 if kind == "float32" else 3e-2
    for i, wanted in enumerate((y.detach(), whole.grad)):
        found = torch.cat([torch.from_numpy(r[i]) for r in results], 1)
        error = (found - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error < tolerance, (i, error)


def without_gradients(group, rank, name, x, cuts, mode):
    layer = sequence_parallel(jobs.make_rnn(name), group)
    with getattr(torch, mode)():
        y, last = layer(x[:, cuts[rank] : cuts[rank + 1]])
    return y.clone().numpy(), last.clone().numpy()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", ["paragru", "slow_gates", "chaotic"])
def test_without_gradients(group, name, mode):
    x, cuts = draw(2, TIME, INPUT), [0, 9, 20, 34, TIME]
    results = group.run(without_gradients, name, x, cuts, mode)
    y, last = looped(name, x)
    parts = torch.cat([torch.from_numpy(r[0]) for r in results], 1)
    torch.testing.assert_close(parts, y, rtol=RTOL, atol=RTOL)
    torch.testing.assert_close(torch.from_numpy(results[0][1]), last, rtol=RTOL, atol=RTOL)


def only_the_last_has_a_gradient(group, rank, x, cuts):
    """Weights without gradients, and x with one on the first rank alone."""
    layer = sequence_parallel(jobs.make_rnn("slow_gates").requires_grad_(False), group)
    part = x[:, cuts[rank] : cuts[rank + 1]].clone().requires_grad_(rank == 0)
    y, _ = layer(part)
    y.square().sum().backward()
    return None if part.grad is None else part.grad.numpy()


def test_gradients_that_one_rank_asks_for(group):
    x, cuts = draw(2, TIME, INPUT), [0, 9, 20, 34, TIME]
    results = group.run(only_the_last_has_a_gradient, x, cuts)
    whole = x.clone().requires_grad_()
    looped("slow_gates", whole)[0].square().sum().backward()
    assert results[1:] == [None] * 3
    found = torch.from_numpy(results[0])
    torch.testing.assert_close(found, whole.grad[:, : cuts[1]], rtol=RTOL, atol=RTOL)


# Errors: on all ranks, and soon


def differing(group, rank, kind):
    """Rank 1 does something else than the others."""
    other = rank == 1
    layer = jobs.make_rnn("paralstm" if other and kind == "cell" else "paragru")
    features = INPUT + 1 if other and kind == "features" else INPUT
    x = torch.randn(3 if other and kind == "batch" else 2, 6, features, dtype=torch.float64)
    if other and kind == "dtype":
        layer, x = layer.float(), x.float()
    if other and kind == "steps":
        x = x[:, :0]
    sequence_parallel(layer, group)
    ends = torch.tensor([0, 5, 6 * group.size() + (1 if kind == "ends" else 0)])
    options = {"cu_seqlens": ends} if kind == "ends" or (kind == "packed" and other) else {}
    if kind in ("ends", "packed"):
        x = x[:1]
    with torch.set_grad_enabled(not (other and kind == "no_grad")):
        return layer(x, **options)


WORDS = {
    "cell": "the cell is",
    "features": "x has shape",
    "batch": "the shape of x without time is",
    "dtype": "the type of x|its tensors",
    "steps": "time must be at least 1",
    "packed": "cu_seqlens is",
    "no_grad": "the recording of gradients is",
    "ends": "cu_seqlens must rise from 0 to the number of steps of all ranks together, 24",
}


@pytest.mark.parametrize("kind", WORDS)
def test_ranks_that_differ_are_an_error_on_all(group, kind):
    for kind_of_error, message in group.run(differing, kind):
        assert kind_of_error in ("RankError", "ValueError"), message
        assert any(words in message for words in WORDS[kind].split("|")), message


class Fails(jobs.cells.Cell):
    def __init__(self):
        super().__init__(1)

    def forward(self, x, h):
        return torch.tanh(self.input(x) + self.diagonal[0] * h)


def failing(group, rank):
    """A failure in the middle of a call: the second run of steps on rank 2."""
    layer = RNN(Fails().double())
    sequence_parallel(layer, group)
    x = torch.randn(1, 5, INPUT, dtype=torch.float64)
    layer(x)
    if rank == 2:
        run = layer.at_all_times
        layer.at_all_times = lambda *a: run(*a) if torch.is_grad_enabled() else 1 / 0
    return layer(x)


def test_a_failure_on_one_rank_is_an_error_on_all(group):
    results = group.run(failing)
    assert results[2][0] == "ZeroDivisionError"
    for rank in (0, 1, 3):
        expected = ("RankError", "rank 2 of the sequence failed: ZeroDivisionError: division by")
        assert (results[rank][0], results[rank][1][: len(expected[1])]) == expected


def backward_of_another_call(group, rank):
    layer = sequence_parallel(jobs.make_rnn("paragru"), group)
    x = torch.randn(1, 5, INPUT, dtype=torch.float64)
    first, second = layer(x)[0].sum(), layer(x)[0].sum()
    (first if rank == 1 else second).backward()


def test_a_backward_pass_of_another_call(group):
    for kind, message in group.run(backward_of_another_call):
        assert kind == "RankError"
        assert "the call whose gradients are computed is 2 on rank 0, 1 on rank 1" in message


def dying(group, rank):
    layer = sequence_parallel(jobs.make_rnn("paragru"), group)
    x = torch.randn(1, 5, INPUT, dtype=torch.float64)
    layer(x)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return layer(x)


def test_a_rank_that_dies_is_an_error_on_all(tmp_path):
    with Group(4, tmp_path, timeout_s=5) as group:
        results = group.run(dying)
    assert results[2] == ("dead", "")
    for rank in (0, 1, 3):
        kind, message = results[rank]
        assert kind == "RankError"
        assert "did not all come to an exchange: " in message
        assert "One has died, has not called the same layers" in message


def without_going_back(group, rank):
    layer = sequence_parallel(jobs.make_rnn("paragru"), group)
    y, _ = layer(torch.randn(1, 5, INPUT, dtype=torch.float64))
    if rank == 1:
        time.sleep(6)  # as one that goes on with something else
        return "nothing"
    y.sum().backward()
    return "gradients"


def test_a_rank_that_never_goes_back_is_named_after_the_timeout(tmp_path):
    with Group(2, tmp_path, timeout_s=3) as group:
        (kind, message), other = group.run(without_going_back)
    assert other == "nothing"
    assert kind == "RankError"
    assert "has not gone back through the outputs of its part" in message
    assert "(0 * y.sum()).backward()" in message
    assert "init_process_group(timeout=...)" in message


def refused(group, rank, kind):
    if kind == "random":
        layer = RNN(Noisy())
        sequence_parallel(layer, group)
        return layer(torch.randn(1, 5, INPUT))
    if kind == "packed":
        layer = sequence_parallel(jobs.make_stack("parallelized"), group)
        x = torch.randn(3, INPUT, dtype=torch.float64)
        return layer(torch.nn.utils.rnn.pack_sequence([x]))
    if kind == "mesh":
        mesh = DeviceMesh("cpu", torch.arange(2).view(1, 2), mesh_dim_names=("data", "sequence"))
        return sequence_parallel(jobs.make_rnn("paragru"), mesh)
    if kind == "nothing":
        return sequence_parallel(torch.nn.Linear(2, 2), group)
    if kind in ("number", "none"):
        return sequence_parallel(jobs.make_rnn("paragru"), 2 if kind == "number" else None)
    if kind == "vmap":
        layer = sequence_parallel(jobs.make_rnn("paragru"), group)
        x = torch.randn(3, 1, 5, INPUT, dtype=torch.float64)
        return torch.func.vmap(lambda x: layer(x)[0])(x)
    import pickle

    return pickle.dumps(sequence_parallel(jobs.make_rnn("paragru"), group))


class Noisy(Fails):
    def forward(self, x, h):
        return torch.tanh(torch.dropout(self.input(x), 0.5, True) + self.diagonal[0] * h)


REFUSED = {
    "packed": ("TypeError", "a PackedSequence, whose time cannot be split over ranks"),
    "mesh": ("ValueError", "mesh has the dimensions ('data', 'sequence'); pass the one"),
    "number": ("TypeError", "got 2, a int"),
    "none": ("ValueError", "the time of RNN is not split"),
    "random": ("TypeError", "Noisy draws random numbers"),
    "nothing": ("ValueError", "Linear is and contains no pararnn.RNN"),
    "vmap": ("TypeError", "transforms of torch.func do not reach across ranks"),
    "pickle": ("TypeError", "cannot be pickled"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(group, kind):
    expected, words = REFUSED[kind]
    for found, message in group.run(refused, kind, count=2):
        assert found == expected, message
        assert words in message


def compiled(group, rank, x, compiles):
    layer = sequence_parallel(jobs.make_rnn("slow_gates"), group)
    part = x.chunk(group.size(), 1)[rank].clone().requires_grad_()

    def run(x):
        return torch.sin(layer(2 * x)[0] + 1)

    y = (torch.compile(run, backend="eager") if compiles else run)(part)
    y.square().sum().backward()
    return y.detach().numpy(), part.grad.numpy()


def test_compiled_around_it(group):
    x = draw(1, 8, INPUT)
    results = [group.run(compiled, x, compiles, count=2) for compiles in (False, True)]
    for plain, found in zip(*results, strict=True):
        for a, b in zip(plain, found, strict=True):
            torch.testing.assert_close(a, b)


def copied(group, rank, x):
    import copy

    layer = copy.deepcopy(sequence_parallel(jobs.make_rnn("paragru"), group))
    part = x.chunk(group.size(), 1)[rank]
    y = layer(part)[0].detach().numpy()
    alone = sequence_parallel(layer, None)(part)[0].detach().numpy()
    return y, alone


def test_copies_are_split_and_none_ends_it(group):
    x = draw(1, 8, INPUT)
    results = group.run(copied, x, count=2)
    whole, _ = looped("paragru", x)
    torch.testing.assert_close(torch.from_numpy(results[1][0]), whole[:, 4:])
    part, _ = looped("paragru", x[:, 4:])
    torch.testing.assert_close(torch.from_numpy(results[1][1]), part)
