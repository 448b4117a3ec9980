"""Captures that fail, with a stand-in for PyTorch's streams and graphs (theirs: tests/gpu)."""

import contextlib
import gc
import types
import weakref

import pytest
import torch

from pararnn.kernels import graphs


class Stream:
    """A stream that notes for which others it waits."""

    device, cuda_stream = torch.device("cuda", 0), 0

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def gpu(monkeypatch):
    """Its current stream; a capture whose end fails stays on its own, as PyTorch's does."""
    here = types.SimpleNamespace(current=Stream())

    @contextlib.contextmanager
    def stream(chosen):
        before, here.current = here.current, chosen
        try:
            yield
        finally:
            here.current = before

    class Graph:
        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self):
            here.current = self.stream

        def __exit__(self, *error):
            raise RuntimeError("the end failed")

    for name, stand_in in {
        "current_stream": lambda: here.current,
        "Stream": Stream,
        "stream": stream,
        "graph": Graph,
        "CUDAGraph": object,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "_give_up", lambda *_: None)
    monkeypatch.setattr(graphs, "_streams", {})
    return here


def test_a_capture_that_fails_leaves_its_stream_and_its_memory(gpu):
    kept, said, first = [], [], gpu.current

    class Activations:
        """A stand-in for them."""

    def waits():
        activations = Activations()
        kept.append(weakref.ref(activations))
        if len(kept) == 3:
            raise RuntimeError("it waits")
        return None

    gc.disable()
    try:
        try:
            graphs.captured(waits)
        except RuntimeError as error:  # pytest.raises would keep its frames
            said.append(str(error))
        assert said == ["it waits"]
        assert gpu.current is first
        assert [activations() for activations in kept] == [None] * 3
    finally:
        gc.enable()


def test_work_that_fails_beside_captures_is_waited_for(gpu, monkeypatch):
    """What follows may overwrite what it still reads."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def fails():
        raise RuntimeError("it waits")

    first = gpu.current
    with pytest.raises(RuntimeError, match="it waits"):
        graphs.rehearsed(fails, strict=True)
    (stream,) = graphs._streams.values()
    assert first.waited == [stream]
    assert gpu.current is first
    assert modes == ["error", 0]
