"""How Triton's kernels are cut: any size gives chunks that the kernels can run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pararnn.planning.triton_plan import Work, plan_launch

GRU = Work(loads=3, itemsize=2, operations=39)
HALF, SINGLE = 4e-3, 1e-6


def plan(batch, time, hidden, chunk=None, work=GRU, tolerance=HALF, adjoint=False):
    return plan_launch(batch, time, hidden, chunk, work, tolerance, 132, adjoint)


@given(
    batch=st.integers(1, 100_000),
    time=st.integers(1, 2_000_000),
    hidden=st.integers(1, 200_000),
    chunk=st.one_of(st.none(), st.integers(1, 3000)),
    loads=st.integers(1, 12),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    operations=st.integers(1, 2000),
    tolerance=st.sampled_from([HALF, SINGLE, 1e-13]),
    adjoint=st.booleans(),
)
def test_every_plan_can_run(
    batch, time, hidden, chunk, loads, itemsize, operations, tolerance, adjoint
):
    work = Work(loads, itemsize, operations)
    launch = plan(batch, time, hidden, chunk, work, tolerance, adjoint)
    assert (launch.chunks - 1) * launch.chunk < time <= launch.chunks * launch.chunk
    assert chunk is None or launch.chunk == min(chunk, time)
    assert launch.unroll <= time
    if launch.chunks > 1:
        assert launch.chunk % launch.unroll == launch.warm % launch.unroll == 0
        assert launch.chunk % launch.wide_unroll == 0
        assert 1 <= launch.warm <= launch.chunk
    for power in (launch.block, launch.group, launch.rows, launch.unroll):
        assert power & (power - 1) == 0
    assert launch.group * launch.warps <= 32
    assert launch.distance == 0 or launch.distance + launch.unroll <= launch.chunk
    assert launch.corrections == (launch.chunks > 1) + (launch.chunks > 16 and not adjoint)
    assert launch.looked_at & (launch.looked_at - 1) == 0


@pytest.mark.parametrize(
    ("size", "forward", "backward"),
    [
        ((32, 2048, 2048), 1, 1),
        ((32, 2048, 1024), 2, 1),
        ((8, 2048, 2048), 4, 6),
        ((8, 2048, 1024), 8, 8),
        ((8, 512, 1024), 4, 4),
        ((1, 2048, 1024), 32, 32),
        ((1, 65536, 64), 512, 512),
        ((1, 65536, 1024), 66, 33),
        ((64, 2048, 4096), 1, 1),
        ((1, 1, 8), 1, 1),
    ],
)
def test_time_is_cut_only_as_far_as_programs_are_few(size, forward, backward):
    assert plan(*size).chunks == forward
    assert plan(*size, adjoint=True).chunks == backward


def test_few_programs_look_further_ahead():
    distances = [plan(b, 2048, 1024, chunk=2048).distance for b in (8, 32, 64, 128)]
    assert distances == [32, 16, 8, 0]
    assert plan(8, 1, 1024).distance == plan(8, 8, 1024).distance == 0


def test_large_steps_are_unrolled_less():
    unrolls = [plan(8, 2048, 1024, work=Work(3, 2, n)).unroll for n in (39, 64, 135, 600)]
    assert unrolls == [8, 8, 2, 1]
    wide = [plan(8, 2048, 1024, work=Work(3, size, 39)).unroll for size in (2, 4, 8)]
    assert wide == [8, 8, 4]
