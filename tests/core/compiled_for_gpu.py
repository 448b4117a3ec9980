"""Compiles the kernels of a layer for an H100 without having one; run by test_triton_interpreted.

Everything is as on a GPU but for the driver, which loads and launches nothing.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget

from pararnn import RNN, Newton
from pararnn.cells import ParaGRUCell
from pararnn.kernels.triton import backend
from pararnn.layers import evaluate

launched, compiled = [], []


class Utils:
    """Loads binaries; says what an H100 has."""

    @staticmethod
    def get_device_properties(_device):
        return {"max_shared_mem": 232448}

    @staticmethod
    def load_binary(*_):
        return 0, 0, 32, 0, 1024


class Driver:
    """As Triton asks for it."""

    utils = Utils

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def launcher_cls(self, source, _metadata):
        return lambda *_: launched.append(source.fn.__name__)


def record(**what):
    compiled.append(what["fn"].name)


together = []
compile_together = backend.compile_together


def counting(launches):
    before = len(compiled)
    compile_together(launches)
    if launches:
        together.append(len(compiled) - before)


triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = record
backend.compile_together = counting
backend.overlaps = lambda _device: True
evaluate.interpreted = lambda: True
rnn = RNN(ParaGRUCell(8, 32), backend="triton", solver=Newton(chunk=8))
y, _ = rnn(torch.randn(2, 48, 8))
y.sum().backward()
print(json.dumps({"compiled": len(compiled), "together": together, "launched": launched}))
