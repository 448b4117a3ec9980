"""Weights that a cell computes by `torch.nn.utils.parametrize`.

They are computed outside of the traced step, once per call of a layer: as PyTorch computes them at
every access, with all that a parametrisation does besides. So spectral norm, which turns its
vectors a little further every time in training, does so once per call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

_ONE_THREAD = threading.RLock()  # PyTorch's cache is that of all threads


def computed(cell: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, by qualified name; buffers stay as they are."""
    found = {}
    for name, module in cell.named_modules():
        if parametrize.is_parametrized(module):
            for weight, parametrisation in module.parametrizations.items():
                with _in_evaluation(parametrisation):
                    found[f"{name}.{weight}" if name else weight] = parametrisation()
    return found


@contextlib.contextmanager
def given(cell: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have the cell read these weights, in one thread at a time."""
    if not weights:
        yield
        return
    with _ONE_THREAD, parametrize.cached():
        known = parametrize._cache
        before = dict(known)
        for name, weight in weights.items():
            owner, _, attribute = name.rpartition(".")
            known[id(cell.get_submodule(owner)), attribute] = weight
        try:
            yield
        finally:
            known.clear()
            known.update(before)


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """Have such weights computed once, for this thread alone."""
    with _ONE_THREAD, parametrize.cached():
        yield


@contextlib.contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
