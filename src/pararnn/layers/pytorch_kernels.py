"""PyTorch's kernels for the cells of `torch.nn`, all steps in one call: which there are, and calls.

The one place that knows them, by the class of a cell. `planning/pytorch_plan.py` says where one is
faster than what the library generates. Results are the same: products are exact to float32 unless
`torch.set_float32_matmul_precision` allows TF32, and in half precision the state has float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pararnn.kernels.operators import gradients_of_loop
from pararnn.kernels.triton.device import rounds_products
from pararnn.tracing.modes import autocasts, forward_of, without_autocast

_PLAIN = (torch.float32, torch.float64)
_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
_CHANGING = threading.Lock()  # cuDNN's settings, which are the same for all threads


class Kernel(NamedTuple):
    """A kernel of PyTorch.

    Attributes:
        run: Runs all steps, as `torch.gru` does.
        mode: The number by which cuDNN knows the step.
        step: The forward pass of the cell.
    """

    run: Callable[..., Any]
    mode: int
    step: Callable[..., Any]


_KERNELS = {
    (nn.RNNCell, "relu"): Kernel(torch.rnn_relu, 0, nn.RNNCell.forward),
    (nn.RNNCell, "tanh"): Kernel(torch.rnn_tanh, 1, nn.RNNCell.forward),
    (nn.LSTMCell, ""): Kernel(torch.lstm, 2, nn.LSTMCell.forward),
    (nn.GRUCell, ""): Kernel(torch.gru, 3, nn.GRUCell.forward),
}


def kernel_of(cell: nn.Module) -> Kernel | None:
    """The kernel for all steps of a cell; None if there is none, or a step may be another."""
    kernel = _KERNELS.get((type(cell), getattr(cell, "nonlinearity", "")))
    if kernel is None:
        return None
    called = forward_of(cell)  # the cell, if anything happens around its forward pass
    if not (inspect.ismethod(called) and called.__func__ is kernel.step):
        return None
    return kernel if all(type(w) in (Tensor, nn.Parameter) for w in _weights(cell)) else None


def library_of(
    cell: nn.Module, dtypes: Sequence[torch.dtype], own: torch.dtype, device: str
) -> str | None:
    """What PyTorch would run all steps with, "cudnn", "onednn" or "aten"; None if it may not.

    Args:
        cell: The cell.
        dtypes: Of x and of the state.
        own: Of the cell.
        device: Type of the device.
    """
    kernel = kernel_of(cell)
    if kernel is None:
        return None
    if device == "cuda":  # cuDNN makes no promise that the same call has the same bits
        there = torch.version.hip is None and torch.backends.cudnn.is_available()
        allowed = there and torch.backends.cudnn.enabled and _has_precision()
        allowed = allowed and not torch.are_deterministic_algorithms_enabled()
        return "cudnn" if allowed and all(d in _ON_GPU for d in (own, *dtypes)) else None
    if device != "cpu" or autocasts(device):
        return None
    if own not in _PLAIN or any(d is not own for d in dtypes):
        return None
    with_mkldnn = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    lstm = kernel.run is torch.lstm and own is torch.float32
    return "onednn" if lstm and with_mkldnn else "aten"


def run(cell: nn.Module, x: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
    """Run all steps.

    Args:
        cell: One for which there is a library.
        x: (batch, time, input_size).
        state: The state before the first step, each (batch, hidden_size).

    Returns:
        The outputs, (batch, time, hidden_size), and the tensors of the state after the last step;
        on a GPU in float32.
    """
    kernel = kernel_of(cell)
    assert kernel is not None
    weights, first = _weights(cell), [s.unsqueeze(0).contiguous() for s in state]
    if x.device.type == "cuda":
        with without_autocast("cuda"):
            x, weights, first = x.float(), [w.float() for w in weights], [s.float() for s in first]
            y, *last = _cudnn(kernel, x, first, weights)
    else:
        y, *last = _native(kernel, x, first, weights)
    return [y.contiguous(), *[s.squeeze(0) for s in last]]


def _weights(cell: nn.Module) -> list[Any]:
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    return [getattr(cell, name) for name in names[: 4 if getattr(cell, "bias", False) else 2]]


def _native(
    kernel: Kernel, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Outputs and last states as PyTorch's operators compute them."""
    given = list(state) if len(state) > 1 else state[0]
    biases, train = len(weights) > 2, torch.is_grad_enabled()
    found: Sequence[Tensor] = kernel.run(x, given, weights, biases, 1, 0.0, train, False, True)
    return found


def _cudnn(
    kernel: Kernel, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Outputs and last states by cuDNN.

    Not by `torch.gru`: that warns where the weights of a cell do not lie one after another, and its
    backward pass rounds as the settings of that moment say.
    """
    tensors = [x, *state, *weights]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        found: Sequence[Tensor] = _Cudnn.apply(kernel, len(state), *tensors)
        return found
    return _forward(kernel, x, state, weights, False)[: 1 + len(state)]


class _Cudnn(torch.autograd.Function):
    """Both passes by cuDNN; second derivatives by PyTorch's other kernels, which have them."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, components: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, state, weights = tensors[0], tensors[1 : 1 + components], tensors[1 + components :]
        *found, reserve, buffer = _forward(kernel, x, state, weights, True)
        ctx.kernel, ctx.components = kernel, components
        ctx.save_for_backward(*tensors, found[0], reserve, buffer)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, y, reserve, buffer = ctx.saved_tensors
        kernel, components = ctx.kernel, ctx.components
        if torch.is_grad_enabled():  # asked for second derivatives

            def again(x: Tensor, *others: Tensor) -> Sequence[Tensor]:
                with _without_cudnn():
                    return _native(kernel, x, others[:components], others[components:])

            return None, None, *gradients_of_loop(again, tensors, grads)
        x, h, *others = tensors
        c, weights = (others[0] if components > 1 else None), others[components - 1 :]
        wanted = ctx.needs_input_grad[2:]
        mask = [*wanted[:2], components > 1 and wanted[2], any(wanted[1 + components :])]
        if torch._C._autograd._get_current_graph_task_keep_graph():
            reserve = reserve.clone()  # cuDNN writes to it, and there may be another backward pass
        of_y, of_h, of_c = (g if g is None else g.contiguous() for g in (*grads, None)[:3])
        with _may_allocate(), _exact():
            of_x, of_h, of_c, of_weights = torch.ops.aten._cudnn_rnn_backward(
                x, weights, len(weights), buffer, h, c, y, of_y, of_h, of_c,
                *_settings(kernel, h, True), reserve, mask,
            )  # fmt: skip
        found = [of_x, of_h, *([of_c] if components > 1 else []), *of_weights]
        found += [None] * (len(tensors) - len(found))  # of no weights at all
        return None, None, *(g if w else None for g, w in zip(found, wanted, strict=True))


def _forward(
    kernel: Kernel, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], train: bool
) -> list[Tensor]:
    """Outputs and last states, and what the backward pass needs: cuDNN's notes, and the weights."""
    h, c = state[0], state[1] if len(state) > 1 else None
    # cuDNN reads all weights from one buffer; without it `_cudnn_rnn` makes one, and warns
    own, settings = [w.detach().clone() for w in weights], _settings(kernel, h, train)
    sizes = x.shape[-1], kernel.mode, h.shape[-1], 0, 1, True, False
    with _may_allocate(), _exact():
        buffer = torch.ops.aten._cudnn_rnn_flatten_weight(own, len(own), *sizes)
        y, of_h, of_c, reserve, buffer = torch.ops.aten._cudnn_rnn(
            x, own, len(own), buffer, h, c, *settings
        )
    return [y, of_h, *([of_c] if len(state) > 1 else []), reserve, buffer]


def _settings(kernel: Kernel, h: Tensor, train: bool) -> tuple[Any, ...]:
    """From the mode on: sizes, one layer, batch first, no dropout, one direction, not packed."""
    return kernel.mode, h.shape[-1], 0, 1, True, 0.0, train, False, [], None


@contextlib.contextmanager
def _may_allocate() -> Iterator[None]:
    """Let cuDNN allocate memory of its own while a CUDA graph is captured.

    Its first call does, and a capture forbids it. That first call may well be a captured one, since
    other kernels may have been faster in the calls before it, which Python launched.
    """
    if torch.version.cuda is None or not torch.cuda.is_current_stream_capturing():
        yield
        return
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED of the driver
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    with _CHANGING:
        torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = True  # as it was, or cuDNN had not been called


def _has_precision() -> bool:
    """Whether PyTorch has a setting of its own for TF32 in recurrent layers (from 2.9 on)."""
    return hasattr(torch.backends.cudnn, "rnn")


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Inside, products are exact to float32 unless the user allows TF32 for those of matrices."""
    settings: Any = torch.backends.cudnn.rnn
    if rounds_products(torch.float32) or settings.fp32_precision == "ieee":
        yield
        return
    with _CHANGING:
        before, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = "none"
            if settings.fp32_precision != before:  # it was not that of all operations
                settings.fp32_precision = before
