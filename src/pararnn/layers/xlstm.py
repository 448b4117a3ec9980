r"""The sLSTM of the package `xlstm` (NX-AI), in place of its cell and with its weights.

    i~, f~, z~, o~ = R h + x + b            x holds what the layer around it has projected
    m' = i~ where n = 0, else max(log sigmoid(f~) + m, i~)
    i  = exp(i~ - m'),  f = min(exp(log sigmoid(f~) + m - m'), 1)
    c' = f * c + i * tanh(z~)
    n' = f * n + i
    h' = sigmoid(o~) * c' / n'

Where nothing has been added to the normaliser n, m is no scale of anything and the input gate
becomes it. From then on n is at least 1 for states that began at zero: it needs no lower bound.

Source: Beck et al. 2024, arXiv 2405.04517, eq. 8 to 17; the first step and the minimum as in the
package's backend in plain PyTorch, version 2.0.4 and later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pararnn.cells._input import project
from pararnn.layers.lending import Lender, check_weights, lend, title
from pararnn.layers.rnn import RNN
from pararnn.planning.plan import Plan
from pararnn.planning.settings import Solver
from pararnn.solvers.report import SolveReport

_GATES = _COMPONENTS = 4
_WEIGHTS = ("_recurrent_kernel_", "_bias_")
_AS_ALWAYS = {  # the settings with which the package computes the recurrence of above
    "function": "slstm",
    "num_gates": _GATES,
    "gradient_recurrent_cut": False,
    "gradient_recurrent_clipval": None,
    "forward_clipval": None,
}


class XLSTMCell(nn.Module):
    """One step with the weights of an `sLSTMCell_vanilla`; the state is `(h, c, n, m)`.

    Args:
        num_heads: Blocks of the recurrent weights.
        head_size: Channels of one head.

    Shapes: `x` (N, 4 * hidden_size), gate after gate; the state, and the result like it, four
    tensors (N, hidden_size). The weights come from elsewhere: `_recurrent_kernel_` (num_heads,
    4 * head_size, head_size) and `_bias_` (4 * hidden_size,).
    """

    num_components = _COMPONENTS
    _recurrent_kernel_: Tensor
    _bias_: Tensor

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.hidden_size = num_heads * head_size
        self.input_size = _GATES * self.hidden_size

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: D102
        h, c, n, m = state
        x_i, x_f, x_z, x_o = (x + self._bias_).unflatten(-1, (_GATES, -1)).unbind(-2)
        recurrent = self._recurrent_kernel_.unflatten(1, (_GATES, -1))
        r_i, r_f, r_z, r_o = project(h, recurrent, None)
        log_input, log_forget = r_i + x_i, F.logsigmoid(r_f + x_f) + m
        m = torch.where(n == 0, log_input, torch.maximum(log_forget, log_input))
        i, f = torch.exp(log_input - m), torch.exp((log_forget - m).clamp_max(0))
        c = f * c + i * torch.tanh(r_z + x_z)
        n = f * n + i
        return torch.sigmoid(r_o + x_o) * c / n, c, n, m


class ParallelSLSTM(Lender):
    """What `parallelize` makes of an `sLSTMCell_vanilla`: its arguments, results and parameters.

    Raises:
        ValueError: The original has settings with which it computes something else.
    """

    def __init__(
        self,
        original: nn.Module,
        name: str = "",
        *,
        solver: Solver | None = None,
        backend: str = "auto",
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__()
        config: Any = original.config
        _check(original, title(original, name))
        self.config = config
        self._kind: Any = parametrize.type_before_parametrizations(original)
        cell = XLSTMCell(config.num_heads, config.hidden_size // config.num_heads)
        for weight in _WEIGHTS:
            lend(original, weight, cell, weight)
        batch_first = config.input_shape.startswith("B")
        rnn = RNN(
            cell,
            batch_first=batch_first,
            solver=solver,
            backend=backend,
            checkpoint_every=checkpoint_every,
        )
        self.layers = nn.ModuleList([rnn])
        self.train(original.training)
        self._lend_from(original, {weight: (0, weight) for weight in _WEIGHTS})

    def forward(
        self, input: Tensor, state: Tensor | None = None, lengths: object = None
    ) -> tuple[Tensor, Tensor]:
        """Evaluate all steps.

        Args:
            input: What the gates get from the input, i, f, z, o after one another: (batch, time,
                4 * hidden_size), or (time, batch, 4 * hidden_size) with `input_shape="SBGNH"`.
            state: h, c, n and m before the first step, (4, batch, hidden_size); zeros when None.
            lengths: Without effect, as in the original.

        Returns:
            The outputs, laid out as `output_shape` says, and the state after the last step.

        Raises:
            ValueError: Shapes do not fit.
        """
        self._check_shapes(input, state)
        self._lend_to_cells()
        rnn = self.layers[0]
        y, last = rnn(input, None if state is None else _as_package(state).unbind(0))
        return self._laid_out(y.transpose(0, 1) if rnn.batch_first else y), torch.stack(last)

    def step(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Evaluate steps, one as a rule; the state returned is the one after them.

        The original returns the state that it was given (version 2.0.6).
        """
        return self(input, state)

    @property
    def report(self) -> SolveReport | None:
        """How the last call went; None before one or when compiled."""
        rnn: Any = self.layers[0]
        return rnn.report

    def plan(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Plan:
        """How a call would be carried out, and why; as `RNN.plan`, for the shape of `input`."""
        self._lend_to_cells()
        rnn: Any = self.layers[0]
        return rnn.plan(shape, dtype)

    @property
    def recurrent_kernel(self) -> Tensor:
        """The recurrent weights as (heads, from, gates, to), to read and to write into."""
        weight: Any = self._recurrent_kernel_
        return weight.detach().unflatten(1, (_GATES, -1)).permute(0, 3, 1, 2)

    @property
    def bias(self) -> Tensor:
        """The biases as (heads, gates, head size), to read and to write into."""
        bias: Any = self._bias_
        return bias.detach().unflatten(0, (_GATES, self.config.num_heads, -1)).transpose(0, 1)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as the original does."""
        with torch.device("meta"):
            original = self._kind(self.config)
        for weight in _WEIGHTS:
            lend(self, weight, original, weight)
        original.reset_parameters()

    def extra_repr(self) -> str:  # noqa: D102
        return f"hidden_size={self.config.hidden_size}, num_heads={self.config.num_heads}"

    def _check_shapes(self, input: Tensor, state: Tensor | None) -> None:
        size, names = self.config.hidden_size, ("time", "batch")
        if self.layers[0].batch_first:
            names = names[::-1]
        if input.dim() != 3 or input.shape[-1] != _GATES * size:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; pass ({', '.join(names)}, {_GATES * size})."
            )
        wanted = (_COMPONENTS, input.shape[names.index("batch")], size)
        if state is not None and tuple(state.shape) != wanted:
            raise ValueError(
                f"state has shape {tuple(state.shape)}; pass {wanted}: (components, batch, "
                "hidden_size), or None for zeros."
            )

    def _laid_out(self, y: Tensor) -> Tensor:
        """Outputs (time, batch, hidden) as the configuration has them."""
        layout = self.config.output_shape
        if "N" in layout:
            y = y.unflatten(-1, (self.config.num_heads, -1))
        axes = "SBNH" if "N" in layout else "SBH"
        return y.permute([axes.index(axis) for axis in layout])


def _check(original: nn.Module, called: str) -> None:
    """Refuse what computes something else, or in other types."""
    config: Any = original.config
    if config.backend != "vanilla":
        raise ValueError(
            f"{called} has backend={config.backend!r}, which computes in types of its own and lays "
            "its weights out in another way; make it with backend='vanilla' and write the weights "
            "into that: vanilla.recurrent_kernel[:] = cell.recurrent_kernel[:], and so the bias."
        )
    for name, value in _AS_ALWAYS.items():
        seen = getattr(config, name, value)
        if seen != value:
            raise ValueError(
                f"{called} has {name}={seen!r}; parallelize takes the recurrence with {name}="
                f"{value!r}: make it with that, or wrap a cell of your own as pararnn.RNN(cell)."
            )
    check_weights(original, _WEIGHTS, called)
    types = [getattr(original, name).dtype for name in _WEIGHTS]
    if types[0] != types[1]:
        raise ValueError(
            f"{called} has recurrent weights of type {types[0]} and biases of type {types[1]}; "
            f"give them one type, as by .to({types[1]}), or use torch.autocast for speed."
        )


def _as_package(state: Tensor) -> Tensor:
    """A state for which the cell takes its first step as the package does.

    The package asks whether n is zero everywhere, the cell for each entry: a few zeros among others
    become a number that is nothing next to what a step adds.
    """
    n = state[2]
    few = (n == 0) & (n != 0).any()
    n = torch.where(few, n + torch.finfo(n.dtype).tiny, n)
    return torch.stack([state[0], state[1], n, state[3]])
