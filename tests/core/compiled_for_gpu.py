"""Compiles the kernels of a layer for an H100 without having one; run by test_triton_interpreted.

Everything is as on a GPU but for the driver, which loads and launches nothing.
"""

import json

import torch
import triton
from pretend_gpu import Driver

from pararnn import RNN, Newton
from pararnn.cells import ParaGRUCell
from pararnn.kernels import facts
from pararnn.kernels.triton import backend, device, forward, launch

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
rnn = RNN(ParaGRUCell(8, 32), backend="triton", solver=Newton(chunk=8))
y, _ = rnn(torch.randn(2, 48, 8))
y.sum().backward()

recurrence = rnn.runner().traced.step.recurrence
version = launch.functions_of(recurrence, "single", False)["version"]
forward.verdict = forward.judge  # as if its text were another
changed = version != launch.functions_of(recurrence, "single", False)["version"]
found = {"compiled": len(compiled), "together": together, "launched": launched, "changed": changed}
print(json.dumps(found))
