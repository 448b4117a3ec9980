"""Turns of kernels whose programs wait for each other: what is waited for, and when."""

import contextlib
import threading
import time
import types

import pytest
import torch
from torch import nn

from pararnn import RNN
from pararnn.cells import LayerNormLSTMCell
from pararnn.kernels import turns
from pararnn.kernels.turns import captured_so_far, turn

from .pretend_gpu import pretend_gpu

GPU = torch.device("cuda", 0)


class Stream:
    """Notes what is enqueued on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.after))


class Event:
    after = None

    def record(self, stream):
        self.after = stream.name


@pytest.fixture
def cuda(monkeypatch):
    """A GPU whose current stream and capture are set by the test."""

    state = types.SimpleNamespace(log=[], here=threading.local())

    def current(device):
        return Stream(state.here.stream, state.log)

    monkeypatch.setattr(turns, "_ends", {})
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    captures = lambda: getattr(state.here, "captures", False)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", captures)
    return state


def test_each_waits_for_the_one_before(cuda):
    for name in ("a", "b", "b", "a"):
        cuda.here.stream = name
        with turn(GPU):
            cuda.log.append((name, "launches", None))
    waits = [entry for entry in cuda.log if entry[1] == "waits for"]
    assert waits == [(n, "waits for", b) for n, b in zip("abba", (None, *"abb"), strict=True)]
    assert [entry[1] for entry in cuda.log] == ["waits for", "launches"] * 4


def test_devices_have_turns_of_their_own(cuda):
    for index, name in ((0, "a"), (1, "b"), (1, "c"), (0, "d")):
        cuda.here.stream = name
        with turn(torch.device("cuda", index)):
            pass
    assert [entry[2] for entry in cuda.log] == [None, None, "b", "a"]


def test_captures_wait_for_nothing_and_are_counted(cuda):
    """A wait for work outside would be an error in a capture."""
    cuda.here.captures, before = True, captured_so_far()
    for _ in range(2):
        with turn(GPU):
            pass
    assert cuda.log == []
    assert captured_so_far() == before + 2


def test_a_launch_that_fails_is_not_waited_for(cuda):
    cuda.here.stream = "a"
    with pytest.raises(ValueError, match="too large"), turn(GPU):
        raise ValueError("too large")
    cuda.here.stream = "b"
    with turn(GPU):
        pass
    assert [entry[2] for entry in cuda.log] == [None, None]


def test_threads_do_not_come_between(cuda):
    """Between the wait and the mark of one launch there is no other."""

    def launch(name):
        cuda.here.stream = name
        for _ in range(20):
            with turn(GPU):
                cuda.log.append((name, "launches", None))
                time.sleep(0)

    threads = [threading.Thread(target=launch, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = None
    for (one, what, after), (other, launches, _) in zip(cuda.log[::2], cuda.log[1::2], strict=True):
        assert (one, what, launches, after) == (other, "waits for", "launches", last)
        last = one


@pytest.mark.parametrize(
    ("cell", "rows", "waits"),
    [
        (lambda: nn.GRUCell(256, 256), 4, True),
        (lambda: nn.GRUCell(1024, 1024), 512, True),
        (lambda: LayerNormLSTMCell(256, 256), 32, True),
        (lambda: nn.GRUCell(32, 32), 4, False),
    ],
    ids=["spread", "wide", "sums", "kept"],
)
def test_every_launch_that_needs_one_takes_one(cell, rows, waits, monkeypatch):
    sweeps = pytest.importorskip("pararnn.kernels.triton.sweeps")
    inside, launched = [], []

    @contextlib.contextmanager
    def taken(device):
        inside.append(device)
        yield
        inside.pop()

    def launch(kernel, grid, arguments):
        cooperative = arguments.get("launch_cooperative_grid", False)
        assert cooperative == bool(inside) == (len(grid) == 3 and grid[2] > 1)
        launched.append(cooperative)

    monkeypatch.setattr(sweeps, "turn", taken)
    monkeypatch.setattr(sweeps, "_launch", launch)
    monkeypatch.setattr(sweeps, "processors", lambda device: 132)
    monkeypatch.setattr(sweeps, "shared_memory", lambda device: 232448)
    with pretend_gpu(), torch.no_grad():
        rnn = RNN(cell(), backend="triton")
        rnn(torch.randn(rows, 8, rnn.cell.hidden_size))
    assert waits in launched
    assert (not waits) not in launched


def test_the_interpreter_has_none():
    with turn(torch.device("cpu")):
        pass
