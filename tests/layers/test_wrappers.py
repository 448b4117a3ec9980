"""Layers in what surrounds them: threads, replicas, adapters, training loops, TorchScript."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import pararnn
from pararnn import RNN
from pararnn.testing import assert_close, loop


class Own(nn.Module):
    """Elementwise, or with a product with the state."""

    input_size, hidden_size, num_components = 3, 8, 1

    def __init__(self, mixes):
        super().__init__()
        self.input = nn.Linear(3, 8)
        self.recurrent = nn.Linear(8, 8) if mixes else None
        self.diagonal = None if mixes else nn.Parameter(torch.randn(8) * 0.3)

    def forward(self, x, h):
        own = self.diagonal * h if self.recurrent is None else self.recurrent(h)
        return torch.tanh(self.input(x) + own)


@pytest.fixture(params=[False, True], ids=["elementwise", "mixing"])
def rnn(request):
    return RNN(Own(request.param).double())


def draw(time=20):
    return torch.randn(2, time, 3, dtype=torch.float64)


def looped(cell, x, state=None):
    return loop(cell, x, x.new_zeros(2, 8) if state is None else state)[0]


def gradients(y, rnn):
    return torch.autograd.grad(y.sin().sum(), list(rnn.parameters()))


def assert_layer(rnn, x):
    """A layer as it is now equals the loop over its cell."""
    assert_close("y", rnn(x)[0], looped(rnn.cell, x), rtol=1e-12)


def test_threads_share_a_layer(rnn):
    """From its first call on, with sequences of their own, forwards and backwards."""
    inputs = [draw(20 + i) for i in range(6)]
    expected = [gradients(looped(rnn.cell, x), rnn) for x in inputs]
    shared, found = copy.deepcopy(rnn), {}

    def work(i):
        for _ in range(5):
            found[i] = gradients(shared(inputs[i])[0], shared)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, of_loop in enumerate(expected):
        for a, b in zip(found[i], of_loop, strict=True):
            assert_close(f"gradient in thread {i}", a, b, rtol=1e-12)


def replica(module):
    """As `nn.DataParallel` makes one for a device: parameters are plain tensors with a history."""
    made = module._replicate_for_data_parallel()
    for name, part in module.named_children():
        made._modules[name] = replica(part)
        setattr(made, name, made._modules[name])
    for name, parameter in module._parameters.items():
        setattr(made, name, parameter if parameter is None else parameter.clone())
    return made


def test_replicas_of_data_parallel(rnn):
    x = draw()
    y = replica(rnn)(x)[0]
    of_loop = looped(rnn.cell, x)
    assert_close("y", y, of_loop, rtol=1e-12)
    for a, b in zip(gradients(y, rnn), gradients(of_loop, rnn), strict=True):
        assert_close("gradient", a, b, rtol=1e-12)


def test_adapters_of_peft():
    """In a cell that was traced before: added, switched, disabled, merged, taken away."""
    peft = pytest.importorskip("peft")
    rnn, x = RNN(Own(True).double()), draw()
    before = rnn(x)[0].detach()
    config = peft.LoraConfig(r=2, target_modules=["input", "recurrent"], init_lora_weights=False)
    model = peft.PeftModel(nn.Sequential(rnn), config)

    def assert_adapted():
        y = model(x)[0]
        assert_close("y", y, looped(rnn.cell, x), rtol=1e-12)
        assert (y - before).abs().amax() > 1e-3
        return y

    y = assert_adapted()
    y.sum().backward()
    trained = {n for n, p in rnn.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in rnn.named_parameters() if "lora" in n}
    with model.disable_adapter():
        assert_close("disabled", model(x)[0], before, rtol=1e-12)
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert (assert_adapted() - y).abs().amax() > 1e-3
    model.merge_adapter()
    assert_adapted()
    model.unmerge_adapter()
    assert_adapted()
    model.unload()
    assert_close("without", rnn(x)[0], before, rtol=1e-12)


def test_a_training_loop(rnn):
    """As trainers write it: the state is carried on, validation in between, an average kept."""
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    average, state, validation = AveragedModel(rnn), None, draw()
    for _ in range(3):
        rnn.train()
        optimizer.zero_grad(set_to_none=True)
        x = draw()
        y, last = rnn(x, state)
        assert_close("y", y, looped(rnn.cell, x, state), rtol=1e-12)
        y.square().mean().backward()
        nn.utils.clip_grad_norm_(rnn.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(rnn)
        state = last.detach()
        rnn.eval()
        with torch.inference_mode():
            checked = rnn(validation)[0].clone()
        assert_close("validation", checked, looped(rnn.cell, validation), rtol=1e-12)
    assert_layer(average.module, validation)


def test_accelerate(rnn):
    accelerate = pytest.importorskip("accelerate")
    accelerator, x = accelerate.Accelerator(cpu=True), draw()
    model, optimizer = accelerator.prepare(rnn, torch.optim.SGD(rnn.parameters(), lr=0.1))
    before = model(x)[0]
    accelerator.backward(before.square().mean())
    optimizer.step()
    assert_layer(accelerator.unwrap_model(model), x)
    assert (model(x)[0] - before).abs().amax() > 1e-4


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("cell", [pararnn.cells.ParaGRUCell, nn.GRUCell])
def test_torchscript_traces_are_right_or_raise(cell):
    """The rows of a cell that mixes channels keep the number of steps of the trace."""
    rnn = RNN(cell(3, 8))
    traced = torch.jit.trace(rnn, (torch.randn(2, 20, 3),), check_trace=False)
    for shape in ((2, 20, 3), (4, 20, 3), (1, 20, 3)):
        x = torch.randn(shape)
        assert_close("y", traced(x)[0], rnn(x)[0], rtol=1e-6)
    x = torch.randn(3, 21, 3)
    if cell is nn.GRUCell:
        with pytest.raises(RuntimeError, match="Expected 20 elements"):
            traced(x)
    else:
        assert_close("y", traced(x)[0], rnn(x)[0], rtol=1e-6)
