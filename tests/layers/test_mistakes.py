"""Mistakes of a first user, and the words that must help: what was wrong, what to do."""

import inspect
import traceback
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import pararnn
from pararnn import RNN, TraceError


class Cell(nn.Module):
    """Right; the mistakes below change its `forward`."""

    def __init__(self, input_size=4, hidden_size=3):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.project = nn.Linear(input_size, hidden_size)
        self.decay = nn.Parameter(torch.rand(hidden_size))
        self.norm = nn.BatchNorm1d(hidden_size)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x, h):
        return torch.tanh(self.decay * h + self.project(x))


class Pair(Cell):
    num_components = 2

    def forward(self, x, state):
        h, m = state
        return torch.tanh(self.decay * h + self.project(x)) + m, 0.5 * m


def with_forward(forward, base=Cell):
    return type("Mistaken", (base,), {"forward": forward})()


def adds_in_place(self, x, h):
    h += self.project(x)
    return h


def writes_entry(self, x, h):
    h[:, 0] = 0
    return torch.tanh(h + self.project(x))


def normalises_state(self, x, h):
    return self.norm(h) + self.project(x)


def counts_in_buffer(self, x, h):
    self.count += 1
    return h + self.project(x)


def counts_in_python(self, x, h):
    self.calls += 1
    return self.decay * h * self.calls + self.project(x)


def leaves_pytorch(self, x, h):
    return torch.from_numpy(np.tanh(h.detach().numpy())) * self.decay + self.project(x)


def leaves_pytorch_by_list(self, x, h):
    return torch.tensor(h.detach().tolist()) * self.decay + self.project(x)


def misspells(self, x, h):
    return self.projekt(x)


def returns_nothing(self, x, h):
    self.project(x)


def returns_list(self, x, h):
    return [h + self.project(x)]


def returns_output_and_state(self, x, h):
    h = torch.tanh(self.decay * h + self.project(x))
    return h, h


def returns_part(self, x, h):
    return (h + self.project(x))[:, :2]


def takes_a_pair_returns_one(self, x, state):
    h, _ = state
    return torch.tanh(h + self.project(x))


def sums_over_rows(self, x, h):
    return self.decay * h + self.project(x).cumsum(0)


def sums_over_rows_from_the_end(self, x, h):
    return self.decay * h + self.project(x).flip(0).cumsum(0).flip(0)


def sums_state_over_rows(self, x, h):
    return self.decay * h.cumsum(0) + self.project(x)


def subtracts_mean_state(self, x, h):
    return self.decay * h + self.project(x) - h.mean(0)


def subtracts_mean_of_x(self, x, h):
    return self.decay * h + self.project(x - x.mean(0))


@pytest.mark.parametrize(
    ("forward", "error", "words"),
    [
        (sums_over_rows, TraceError, "mixes the rows of x"),
        (subtracts_mean_of_x, TraceError, r"the rows of x at .*test_mistakes.py:\d+ \(batch"),
        (sums_over_rows_from_the_end, TraceError, "mixes the rows of x"),
        (sums_state_over_rows, TraceError, "mixes the rows of its state"),
        (subtracts_mean_state, TraceError, "the rows of its state at .*test_mistakes.py:"),
        (adds_in_place, TraceError, "writes into its state in place at .*test_mistakes.py:"),
        (writes_entry, TraceError, "writes into its state in place at .*test_mistakes.py:"),
        (normalises_state, TraceError, r"writes into self\.norm\.num_batches_tracked in place"),
        (counts_in_buffer, TraceError, r"writes into self\.count in place"),
        (counts_in_python, TraceError, "or that changes from call to call"),
        (leaves_pytorch, TraceError, "test_mistakes.py:.* PyTorch did not compute"),
        (leaves_pytorch_by_list, TraceError, "test_mistakes.py:.* PyTorch did not compute"),
        (misspells, TypeError, "it raised AttributeError: .*projekt"),
        (returns_nothing, TypeError, "it returned a NoneType.*Is a `return` missing"),
        (returns_list, TypeError, "it returned a list of 1.*Return the tensor itself"),
        (returns_output_and_state, TypeError, r"with 1 it returned a tuple of 2.*readout\(self, x"),
        (returns_part, TypeError, r"returned a tensor of shape \(11, 2\)"),
        (takes_a_pair_returns_one, TypeError, r"with 2 it returned a tensor of shape \(11, 3\)"),
    ],
)
def test_cell(forward, error, words):
    with pytest.raises(error, match=words):
        RNN(with_forward(forward))


class Knows(Cell):
    """How many tensors its state has is not tried, but taken from the cell."""

    num_components = 1


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (returns_nothing, "returned None; .*Is a `return` missing"),
        (returns_list, "returned a list of 1; .*Return the tensor itself"),
        (returns_output_and_state, r"returned a tuple of 2; .*readout\(self, x, state\)"),
        (lambda c, h, x: Cell.forward(c, x, h), r"takes its state first.*: swap"),
    ],
)
def test_cell_that_says_how_many_tensors_its_state_has(forward, words):
    with pytest.raises(TraceError, match=words):
        RNN(with_forward(forward, Knows))


def ignores_its_state(self, x, h):
    return torch.tanh(self.project(x))


def ignores_all_of_its_state(self, x, state):
    return torch.tanh(self.project(x)), self.project(x)


@pytest.mark.parametrize(
    ("forward", "base"), [(ignores_its_state, Cell), (ignores_all_of_its_state, Pair)]
)
def test_a_cell_that_ignores_its_state_is_told(forward, base):
    for use in (RNN, pararnn.testing.check_cell):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            use(with_forward(forward, base))
        (one,) = told
        assert "Mistaken ignores its state: what it returns depends on x alone" in str(one.message)


def test_shapes_that_do_not_fit_inside_of_a_cell_of_several_tensors():
    """The number that was passed may be right: it is not what the message doubts."""

    class Wide(Pair):
        num_components = None

        def forward(self, x, state):
            h, c = state
            return torch.tanh(self.project(x) + h @ torch.ones(9, 4)), c

    rnn = RNN(Wide(), num_components=2)
    with pytest.raises(ValueError, match="Its 2 components, as was passed, had") as raised:
        rnn(torch.randn(2, 5, Wide().input_size))
    assert "cannot be multiplied" in str(raised.value)
    assert "leave it out" not in str(raised.value)
    assert len(traceback.extract_tb(raised.value.__traceback__)) < 9


@pytest.mark.parametrize(
    "kind",
    [c for c in vars(pararnn.cells).values() if isinstance(c, type)],
    ids=lambda c: c.__name__,
)
def test_a_wrong_argument_of_a_cell_names_the_cell(kind):
    with pytest.raises(
        TypeError, match=rf"^{kind.__name__}\.__init__\(\) got an unexpected keyword"
    ):
        kind(3, 4, 5, nonsense=1)


def test_a_component_may_be_written_alone():
    """As the output of an LSTM that reads its cell state only."""
    RNN(with_forward(lambda self, x, s: (torch.tanh(s[1]), 0.5 * s[1] + self.project(x)), Pair))


def multiplies_wrong_sizes(self, x, h):
    return self.project(torch.cat([x, x], -1)) + h


@pytest.mark.parametrize("base", [Cell, Knows])
@pytest.mark.parametrize(
    "forward",
    [adds_in_place, misspells, multiplies_wrong_sizes, subtracts_mean_state, counts_in_python],
)
def test_errors_about_a_cell_end_at_its_line(forward, base):
    """A few frames of ours and PyTorch's, then the user's; so do the errors that caused them."""
    code = forward.__code__
    for call in (RNN, lambda cell: RNN(cell)(X)):
        cell = with_forward(forward, base)
        if call is not RNN:
            del cell.input_size
        with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)) as caught:
            call(cell)
        error = caught.value
        while error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            assert frames[-1].filename == code.co_filename, frames
            assert code.co_firstlineno < frames[-1].lineno < code.co_firstlineno + 5
            assert len([f for f in frames if f.filename != code.co_filename]) <= 7
            error = error.__cause__


def raises_from_itself(self, x, h):
    try:
        return self.projekt(x)
    except AttributeError as error:
        raise error from error


def tries_again(self, x, h, times=40):
    """Each error is both the cause and the context of the next one."""
    try:
        if not times:
            return self.projekt(x)
        return tries_again(self, x, h, times - 1)
    except AttributeError as error:
        raise AttributeError(f"{times}: {error}") from error


@pytest.mark.parametrize("base", [Cell, Knows])
@pytest.mark.parametrize("forward", [raises_from_itself, tries_again])
def test_errors_that_come_from_many_or_from_themselves(forward, base):
    with pytest.raises((AttributeError, TypeError), match="projekt"):
        RNN(with_forward(forward, base))


def test_an_error_that_is_handled_around_the_call_keeps_its_frames():
    try:
        torch.zeros(2).split(-1)
    except RuntimeError as error:
        around = error
        before = traceback.extract_tb(error.__traceback__)
        with pytest.raises(AttributeError, match="projekt"):
            RNN(with_forward(misspells, Knows))
    assert "_tensor.py" in before[-1].filename
    assert traceback.extract_tb(around.__traceback__) == before


def test_errors_of_scanned_functions_end_at_their_line():
    def step(h, x):
        return h @ torch.ones(7, 7) + x

    with pytest.raises(RuntimeError) as caught:
        pararnn.scan(step, torch.zeros(2, 3), torch.zeros(2, 6, 3))
    assert traceback.extract_tb(caught.tb)[-1].name == "step"


def test_faults_of_the_library_keep_their_frames(monkeypatch):
    monkeypatch.setattr("pararnn.tracing.structure.capture", None)
    with pytest.raises(TypeError, match="not callable") as caught:
        RNN(Cell())
    assert "structure.py" in "".join(traceback.format_tb(caught.tb))


def test_modules_that_are_no_cells():
    with pytest.raises(TypeError, match=r"Linear is no cell: .*\(x, state\)"):
        RNN(nn.Linear(4, 3))


X = torch.zeros(2, 6, 4)


def test_rows_of_integers_that_mix():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden_size, self.num_components = 3, 1
            self.embed = nn.Embedding(9, 3)

        def forward(self, x, h):
            return 0.5 * h + self.embed(x).cumsum(0)

    with pytest.raises(TraceError, match="mixes the rows of x"):
        RNN(Text())(torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: RNN(Cell())(X.numpy()), TypeError, r"got a ndarray; use torch\.as_tensor"),
        (lambda: RNN(Cell()).step(X[:, 0].numpy()), TypeError, "got a ndarray"),
        (lambda: RNN(Cell())(X, np.zeros((2, 3))), TypeError, "state must be .*got a ndarray"),
        (lambda: RNN(Pair())(X, [torch.zeros(2, 3)] * 2), TypeError, "got a list of 2"),
        (lambda: RNN(Pair())(X, (torch.zeros(2, 3), None)), TypeError, "with a NoneType in it"),
        (lambda: RNN(Pair())(X, torch.zeros(2, 3)), ValueError, r"2 tensors of shape \(2, 3\)"),
        (lambda: RNN(Cell()).step(X), ValueError, r"x_t has shape \(2, 6, 4\); pass one time"),
        (lambda: RNN(Cell())(X[:1], cu_seqlens=[0, 6]), TypeError, "cu_seqlens must be a tensor"),
        (
            lambda: RNN(Cell())(X[:1], cu_seqlens=torch.tensor([0.0, 6.0])),
            TypeError,
            "cu_seqlens must be integers, got torch.float32",
        ),
        (
            lambda: RNN(Cell())(X[:1], resets=[[True] * 6]),
            TypeError,
            "resets must be a tensor of booleans, got a list of 1",
        ),
        (
            lambda: RNN(Cell())(pack_sequence([X[0]])),
            TypeError,
            "got a PackedSequence of 4; put .* and pass cu_seqlens",
        ),
        (lambda: pararnn.ParaGRU(4, 3)(X.numpy()), TypeError, "PackedSequence, got a ndarray"),
        (lambda: pararnn.ParaLSTM(4, 3)(X, [X, X]), TypeError, "got a list of"),
        (lambda: pararnn.scan(Cell(), torch.zeros(2, 4), X.numpy()), TypeError, "got a ndarray"),
        (lambda: pararnn.scan(Cell(), [torch.zeros(2, 4)], X), TypeError, "got a list"),
        (lambda: pararnn.testing.check_cell(RNN(Cell())), TypeError, "pass the cell alone"),
        (lambda: pararnn.explain(Cell()), TypeError, r"wrap a cell as RNN\(cell\)"),
    ],
)
def test_call(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_constants_that_stay_are_fine():
    """A tensor made anew at each call from the same numbers is a constant."""

    def forward(self, x, h):
        return torch.tanh(self.decay * h * torch.tensor([0.1, 0.2, 0.3]) + self.project(x))

    assert pararnn.testing.check_cell(with_forward(forward)).structure == "elementwise"


KINDS = [pararnn.ParaGRU, pararnn.ParaLSTM]
KINDS += [kind for kind in vars(pararnn.cells).values() if isinstance(kind, type)]


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "**kwargs" not in str(inspect.signature(kind))]
)
def test_a_wrong_argument_is_one_of_the_class_that_was_called(kind):
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\.__init__\(\) .*'layers'"):
        kind(4, 8, layers=2)
