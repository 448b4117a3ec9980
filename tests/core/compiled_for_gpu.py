"""Compiles the kernels of a layer for an H100 without having one; run by test_triton_interpreted.

Everything is as on a GPU but for the driver, which loads and launches nothing.
"""

import inspect
import json

import torch
import triton
from pretend_gpu import Driver
from triton.compiler.code_generator import CodeGenerator

from pararnn import RNN, Newton
from pararnn.kernels import facts
from pararnn.kernels.triton import backend, build, device, forward, launch

launched, compiled = [], []


class Noting(Driver):
    """Notes what is launched."""

    def launcher_cls(self, source, _metadata):
        return lambda *_: launched.append(source.fn.__name__)


def record(**what):
    compiled.append(what["src"].name)


together = []
compile_together = backend.compile_together


def counting(launches):
    before = len(compiled)
    compile_together(launches)
    if launches:
        together.append(len(compiled) - before)


triton.runtime.driver.set_active(Noting())
triton.knobs.compilation.listener = record
backend.compile_together = counting
backend.overlaps = device.overlaps = lambda _device: True
facts.interpreted = lambda: True
called, confused = {}, set()
call_function = CodeGenerator.call_JitFunction


def leaves(value, path=()):
    """What is in tuples, with its place."""
    values = getattr(value, "values", value)
    if isinstance(values, (list, tuple)):
        for n, inner in enumerate(values):
            yield from leaves(inner, (*path, n))
    else:
        yield path, value


def telling_apart(self, function, args, kwargs, *rest):
    """Note functions that Triton 3.6 takes for one: it looks at values, not at their places."""
    given = inspect.getcallargs(function.fn, *args, **kwargs)
    values, constants, places = [], [], []
    for path, value in leaves([given[name] for name in function.arg_names]):
        if isinstance(value, triton.language.core.base_value) and not isinstance(
            value, triton.language.constexpr
        ):
            values.append(str(value.type))
            places.append(path)
        else:
            constants.append((path, repr(value)))
    key = id(self.module), function.fn, tuple(values), tuple(constants)
    if called.setdefault(key, places) != places:
        confused.add(function.__name__)
    return call_function(self, function, args, kwargs, *rest)


CodeGenerator.call_JitFunction = telling_apart


class Leaky(torch.nn.Module):
    """One component and as many coefficients: what is carried backwards counts alike."""

    input_size = hidden_size = 32

    def __init__(self):
        super().__init__()
        self.keep = torch.nn.Parameter(torch.rand(32))

    def forward(self, x, h):
        return torch.tanh(x + self.keep * h)


rnn = RNN(Leaky().double(), backend="triton", solver=Newton(chunk=8))
y, _ = rnn(torch.randn(2, 48, 32, dtype=torch.float64))
y.sum().backward()

recurrence = rnn.runner().traced.step.recurrence
version = launch.functions_of(recurrence, "double", False)["version"]
forward.verdict = forward.judge  # as if its text were another
changed = version != launch.functions_of(recurrence, "double", False)["version"]
found = {
    "compiled": len(compiled),
    "together": together,
    "threads": build._PARSES_IN_THREADS,
    "launched": launched,
    "changed": changed,
}
found["confused"] = sorted(confused)
print(json.dumps(found))
