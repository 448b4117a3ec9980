"""Few rows: programs share the channels of a cell, keep parts of its weights and exchange sums."""

import dataclasses
import functools
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from pararnn import RNN, Sequential
from pararnn.cells import BlockGRUCell, LayerNormLSTMCell
from pararnn.kernels import fused
from pararnn.kernels.spread import OWN, REPEATED, SENT
from pararnn.kernels.stages import NotFused
from pararnn.kernels.triton import sweeps
from pararnn.planning.costs import COSTS
from pararnn.planning.kernel_plans import SpreadLaunch, most_spread_rows, plan_spread
from pararnn.planning.rows_plan import plan_rows
from pararnn.solvers.chunks import WHOLE, Chunks, Cut, Redo, Sweep
from pararnn.solvers.chunks import run_steps as one_by_one
from pararnn.testing import assert_close, loop

from .compare import as_tuple, assert_same, outcome, random_state, with_resets
from .conftest import needs_triton
from .norm_cells import INPUT, NORMED, GatedLayer
from .test_fused import CELLS, compare, random_rows, steps_of, with_reset_states
from .test_norms import Chunked

MADE = {
    **CELLS,
    "gru_of_33": lambda: nn.GRUCell(INPUT, 33),
    "block_gru": lambda: BlockGRUCell(INPUT, 24, num_blocks=4),
    "block_gru_of_32": lambda: BlockGRUCell(INPUT, 32, num_blocks=4),
    "layer_norm_lstm": lambda: LayerNormLSTMCell(INPUT, 19),
    "gated_layer": lambda: GatedLayer(18, 7),
    "larger_layer": Chunked,
}
SHARED = ["gru_of_33", "block_gru", "block_gru_of_32", "layer_norm_lstm", "gated_layer"]
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "adjoint"])


def make(name, dtype=torch.float64):
    torch.manual_seed(5)
    return MADE[name]().to(dtype)


def run_spread(chunks, state, sweep=WHOLE, rows=2, block=None):
    """With so many rows and channels of a program, all channels by default."""
    launches = []

    def planned(size, groups, count, itemsize, processors, sizes):
        channels = block or max(16, 1 << (size - 1).bit_length())
        assert sizes(channels) is not None
        launches.append(SpreadLaunch(rows, -(-size // channels), channels, 4))
        return launches[-1]

    with (
        mock.patch.object(fused, "_known", weakref.WeakKeyDictionary()),
        mock.patch.object(sweeps, "keeps_weights", return_value=False),
        mock.patch.object(sweeps, "plan_spread", planned),
    ):
        found = fused.run_steps(chunks, state, sweep)
    assert launches
    return found


def spread_of(name, direction, block):
    """The step of a cell, or of its adjoint, for programs with so many channels."""
    of, chunks = steps_of(make(name), torch.float64, direction, Cut(2, 2, 2))
    with mock.patch.object(sweeps, "keeps_weights", return_value=False):
        return fused._kernel(chunks, random_rows(of, chunks.cut, torch.float64)).spreads.spread(
            block
        )


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("name", MADE)
def test_one_program_with_all_channels(name, direction):
    dtype = torch.float64
    of, chunks = steps_of(make(name, dtype), dtype, direction, Cut(batch=2, time=7, chunk=4))
    compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run_spread)


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("name", SHARED)
def test_programs_share_channels(name, rows, direction):
    """Some rows of the last program do not exist."""
    from .at_once import programs_at_once

    dtype = torch.float32 if rows == 4 else torch.float64
    run = functools.partial(run_spread, rows=rows, block=16)
    of, chunks = steps_of(make(name, dtype), dtype, direction, Cut(batch=3, time=5, chunk=5))
    with programs_at_once(132):
        compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run)


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("name", ["block_gru", "layer_norm_lstm", "gated_layer"])
def test_small_layers_that_are_exchanged_too(name, direction):
    from .at_once import programs_at_once

    dtype, run = torch.float64, functools.partial(run_spread, block=16)
    of, chunks = steps_of(make(name), dtype, direction, Cut(batch=2, time=4, chunk=4))
    with programs_at_once(132), mock.patch.object(sweeps, "computes_late", return_value=False):
        compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run)


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("name", ["gru_of_33", "block_gru"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_chunks_starts_and_order(name, direction, reverse, backwards):
    """Strided inputs, states that are replaced, both directions, copies, chunks cut off."""
    from .at_once import programs_at_once

    dtype, cut = torch.float64, Cut(2, 5, 3, backwards)
    run = functools.partial(run_spread, block=16)
    of, chunks = steps_of(make(name), dtype, direction, cut, strided=True)
    chunks = Chunks(chunks.step, cut, chunks.inputs, None, (), reverse)
    chunks = with_reset_states(of, chunks, dtype, reverse)
    with programs_at_once(132):
        if not reverse:
            compare(chunks, random_rows(of, cut, dtype), dtype, run=run)
            compare(chunks, random_rows(of, cut, dtype), dtype, run=run, first=2, keep=False)
        rows = random_rows(of, cut, dtype, copies=2)
        compare(chunks, rows, dtype, copies=2, run=run, keep=False)


@needs_triton
@pytest.mark.parametrize("backwards", [False, True])
def test_sequences_that_are_run_again(backwards):
    """Settled ones stay as they are; programs with none to run do nothing."""
    from .at_once import programs_at_once

    dtype, cut = torch.float64, Cut(5, 4, 4, backwards)
    of, chunks = steps_of(make("layer_norm_lstm"), dtype, "forward", cut)
    state, settled = random_rows(of, cut, dtype), torch.tensor([True, True, True, True, False])
    found = [torch.ones(5, 4, of.hidden, dtype=dtype) for _ in state]
    with programs_at_once(132):
        run_spread(chunks, state, Sweep(redo=Redo(found, settled)), block=16)
    expected, _ = one_by_one(chunks, state)
    for a, e in zip(found, expected, strict=True):
        e[settled] = 1.0
        assert_close("states", a, e, rtol=1e-12)


@needs_triton
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("name", ["gru_of_33", "block_gru", "layer_norm_lstm"])
def test_layer_equals_loop(name, resets):
    """With every gradient; the plan chooses rows, channels and programs itself."""
    from .at_once import programs_at_once

    cell, few = make(name), dataclasses.replace(COSTS, spread_weights=1 << 14)
    planned = functools.partial(plan_spread, costs=few)
    x, launch = torch.randn(3, 5, INPUT, dtype=torch.float64), mock.Mock(side_effect=planned)
    with (
        programs_at_once(132),
        mock.patch.object(sweeps, "keeps_weights", return_value=False),
        mock.patch.object(sweeps, "plan_spread", launch),
    ):
        rnn = RNN(cell, solver=Sequential(), backend="triton")
        state = random_state(rnn.num_components, 3, rnn.hidden_size)
        found, expected = rnn, functools.partial(loop, cell)
        if resets:
            mask = torch.rand(3, 5) < 0.3
            fresh = random_state(rnn.num_components, 3, rnn.hidden_size)
            state = (*as_tuple(state), *as_tuple(fresh))
            found, expected = with_resets(found, mask), with_resets(expected, mask)
        assert_same(outcome(found, cell, x, state), outcome(expected, cell, x, state), 1e-10)
    assert launch.call_count


@needs_triton
def test_who_computes_the_sums_of_a_block_gru():
    spread = spread_of("block_gru_of_32", "forward", 16)
    block, layer, spread_layer, *gates = (s.way for s in spread.products)
    assert (block, layer, spread_layer, gates) == (OWN, SENT, REPEATED, [OWN] * 3)
    of_layer, of_all = (s.way for s in spread.totals)
    assert (of_layer, of_all) == (REPEATED, SENT)


@needs_triton
@pytest.mark.parametrize(
    ("name", "forward", "adjoint"),
    [
        ("gru_of_33", 1, 1),
        ("gru_of_16", 0, 0),
        ("block_gru", 3, 3),
        ("block_gru_of_32", 2, 2),
        ("layer_norm_lstm", 3, 3),
        ("gated_layer", 2, 2),
    ],
)
def test_how_often_programs_wait(name, forward, adjoint):
    assert spread_of(name, "forward", 16).waits == forward
    assert spread_of(name, "adjoint", 16).waits == adjoint


@needs_triton
@pytest.mark.parametrize("name", ["mixed_heads", "extremes"])
def test_sums_of_parts_are_left_to_the_other_kernel(name):
    of, chunks = steps_of(NORMED[name]().double(), torch.float64, "forward", Cut(2, 2, 2))
    kernel = fused._kernel(chunks, random_rows(of, chunks.cut, torch.float64))
    assert kernel.spreads.sizes(16) is None
    assert kernel.spreads.most_rows(torch.zeros(1, dtype=torch.float64)) == 0
    with pytest.raises(NotFused, match="sums of parts"):
        kernel.spreads.spread(16)


def of_a_gru(hidden):
    """What `plan_spread` asks: rounds and weights of programs with so many channels."""
    return lambda block: (int(block < hidden), 3 * hidden * block)


def test_a_launch_has_as_few_rows_of_a_program_as_the_device_has_room_for():
    for rows, own in ((1, 1), (16, 1), (17, 2), (32, 2), (33, 4), (64, 4)):
        launch = plan_spread(256, 1, rows, 4, 132, of_a_gru(256))
        assert launch.rows == own
        assert -(-rows // own) * launch.parts <= 132
        assert launch.parts * launch.block >= 256
        assert 3 * 256 * launch.block * 4 <= COSTS.spread_weights


@pytest.mark.parametrize(("hidden", "groups"), [(256, 1), (512, 1), (300, 1), (256, 3), (1024, 1)])
@pytest.mark.parametrize("processors", [16, 80, 132])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_most_rows_are_those_that_have_a_launch(hidden, groups, processors, itemsize):
    given = itemsize, processors, of_a_gru(hidden)
    most = most_spread_rows(hidden, groups, *given)
    assert plan_spread(hidden, groups, most + 1, *given) is None
    assert most == 0 or plan_spread(hidden, groups, most, *given) is not None
    assert (most == 0) == (hidden == 1024 or 4 * most < 1)  # whose weights do not fit


def test_fewer_rounds_are_chosen_before_more_programs():
    launch = plan_spread(64, 1, 1, 4, 132, of_a_gru(64))
    assert (launch.block, launch.parts) == (64, 1)


def test_chunks_are_tried_where_they_gain_against_steps_that_keep_the_weights():
    sizes = 256, 682.0, 16
    assert not isinstance(plan_rows(*sizes, 512, quick=False), Sequential)
    assert isinstance(plan_rows(*sizes, 512, quick=True), Sequential)
    assert not isinstance(plan_rows(*sizes, 8192, quick=True), Sequential)
