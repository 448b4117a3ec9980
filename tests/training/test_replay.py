"""Passes that are replayed, with a stand-in for CUDA graphs (those: tests/gpu/test_training.py)."""

import contextlib
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from pararnn.lm.training import replay
from pararnn.lm.training.replay import Replay


class StandIn:
    """What `captured` returns: every call runs the work again and writes to the same tensors."""

    def __init__(self, run, beside=None):
        self.graph, self.run, self.beside, self.calls = self, run, beside, 0
        for _ in range(2):
            run()
        self.kept = run()
        self.written = [p.grad for p in MODEL[0].parameters()]

    def __call__(self):
        self.calls += 1
        kept, written = self.kept, self.written
        self.kept = kept.copy_(self.run())
        for p, tensor in zip(MODEL[0].parameters(), written, strict=True):
            p.grad = tensor.copy_(p.grad)


MODEL: list[nn.Module] = []


@pytest.fixture
def model(monkeypatch):
    torch.manual_seed(0)
    found = nn.Linear(3, 1)
    MODEL[:] = [found]
    monkeypatch.setattr(replay, "captured", StandIn)
    monkeypatch.setattr(replay, "rehearsed", lambda run, strict=False: run())
    monkeypatch.setattr(Replay, "_obstacle", lambda *_: None)
    return found


def passes_of(model, carried):
    """Two sums over batches, with random numbers and a state that goes on."""

    def passes(batches):
        total = sum(
            (model(batch) * (1 + torch.rand(len(batch), 1)) + carried).sum() for batch in batches
        )
        total.backward()
        carried.add_(1)
        return total.detach()

    return passes


def test_every_step_is_a_replay_with_the_same_result(model):
    """The state, gradients and random numbers are those of passes that are launched."""
    data = [[torch.randn(4, 3), torch.randn(4, 3)] for _ in range(3)]
    results = []
    for replayed in (False, True):
        carried = torch.zeros(1)
        run = passes_of(model, carried)
        replaying = Replay(model, [carried])
        torch.manual_seed(1)
        for batches in data:
            loss = replaying(run, batches) if replayed else run(batches)
            gradients = [p.grad.clone() for p in model.parameters()]
            results.append([loss.clone(), carried.clone(), *gradients])
            model.zero_grad(set_to_none=True)
    for launched, again in zip(results[:3], results[3:], strict=True):
        for a, b in zip(launched, again, strict=True):
            assert torch.equal(a, b)
    (recorded,) = replaying._known.values()
    assert recorded.graph.calls == 3


def test_a_graph_for_each_form_shares_the_memory_of_the_first(model):
    replaying = Replay(model)
    run = passes_of(model, torch.zeros(1))
    for shape, form in [((4, 3), True), ((4, 3), False), ((2, 3), True), ((4, 3), True)]:
        replaying(run, [torch.randn(shape)], form)
    first, *others = (recorded.graph for recorded in replaying._known.values())
    assert len(others) == 2
    assert first.beside is None
    assert all(graph.beside is first for graph in others)


def test_what_cannot_be_captured_is_launched(model, monkeypatch, capsys):
    """With its own state and random numbers, and one note."""

    def fails(run, beside=None):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replay, "captured", fails)
    carried = torch.zeros(1)
    replaying = Replay(model, [carried])
    run, batch = passes_of(model, carried), torch.randn(4, 3)
    torch.manual_seed(1)
    found = [replaying(run, [batch]).clone() for _ in range(2)]
    assert carried == 2
    carried.zero_()
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    expected = [run([batch]) for _ in range(2)]
    assert found == expected
    said = capsys.readouterr()
    assert (said.out + said.err).count("operation not permitted") == 1
    assert "more" not in said.out + said.err


def test_passes_that_take_much_memory_are_launched(model, monkeypatch, capsys):
    """The first passes count then, and are not taken again."""
    monkeypatch.setattr(Replay, "_obstacle", lambda *_: "they take 90 GiB")
    carried = torch.zeros(1)
    replaying = Replay(model, [carried])
    replaying(passes_of(model, carried), [torch.randn(4, 3)])
    assert carried == 1
    assert replaying.reason == "they take 90 GiB"
    said = capsys.readouterr()
    assert "kernel by kernel: they take 90 GiB." in said.out + said.err


def test_buffers_that_passes_overwrite_are_those_of_launched_passes(model):
    """Though the first step runs them several times."""
    model.register_buffer("count", torch.zeros(1))
    model.register_buffer("alike", torch.zeros(1).expand(3))
    run = passes_of(model, torch.zeros(1))

    def counting(batches):
        model.count.add_(1)
        return run(batches)

    replaying = Replay(model)
    for _ in range(3):
        replaying(counting, [torch.randn(4, 3)])
    assert model.count == 3


def test_other_threads_settle_before_a_graph_is_made(model, monkeypatch):
    """Not before the first passes, which compile meanwhile; and not for replays."""
    events = []

    def noting(run, strict=False):
        events.append("strict" if strict else "first")
        return run()

    monkeypatch.setattr(replay, "rehearsed", noting)
    replaying = Replay(model)
    replaying.settle = lambda: events.append("settle")
    for _ in range(2):
        replaying(passes_of(model, torch.zeros(1)), [torch.randn(4, 3)])
    assert events == ["first", "settle", "strict"]


def test_nothing_of_a_failed_capture_is_kept(model, monkeypatch):
    """Nor graphs of other forms: launched passes need the memory."""
    run, kept = passes_of(model, torch.zeros(1)), []

    class Activations:
        """A stand-in for them."""

    def fails(batches):
        activations = Activations()
        kept.append(weakref.ref(activations))
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        except RuntimeError as error:
            activations.error = error  # a cycle, through the frames of the error
            raise

    replaying = Replay(model)
    replaying(run, [torch.randn(4, 3)])
    assert replaying._known
    monkeypatch.setattr(replay, "captured", lambda _, beside=None: fails([]))
    gc.disable()
    try:
        replaying(run, [torch.randn(2, 3)])
    finally:
        gc.enable()
    assert kept[0]() is None
    assert not replaying._known


def test_passes_run_with_their_gpu_as_the_current_one(model, monkeypatch):
    """Streams are those of the current device: a capture on another one would be empty."""
    entered, second = [], torch.device("cuda", 1)

    @contextlib.contextmanager
    def device(chosen):
        entered.append(chosen)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    there = types.SimpleNamespace(device=second)
    monkeypatch.setattr(model, "parameters", lambda: iter([there]))
    replaying, batch = Replay(model), torch.randn(4, 3)
    replaying._known[None, batch.shape] = lambda _: torch.tensor(float(len(entered)))
    assert replaying(passes_of(model, 0), [batch]) == 1
    assert entered == [second]
