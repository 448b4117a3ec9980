"""`parallelize`: PyTorch's recurrent layers, with their weights, evaluated by `RNN`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pararnn.layers.by_layer import ByLayer
from pararnn.layers.lending import Lender, check_weights, lend, title
from pararnn.layers.rnn import RNN, State
from pararnn.layers.stacked import StackedRNN
from pararnn.layers.xlstm import ParallelSLSTM
from pararnn.planning.plan import Plan
from pararnn.planning.settings import Solver

_CELLS: dict[type[nn.Module], type[nn.RNNCellBase]] = {
    nn.GRU: nn.GRUCell,
    nn.LSTM: nn.LSTMCell,
    nn.RNN: nn.RNNCell,
}


def parallelize(
    module: nn.Module,
    *,
    solver: Solver | None = None,
    backend: str = "auto",
    checkpoint_every: int | None = None,
) -> nn.Module:
    """Have `nn.GRU`, `nn.LSTM`, `nn.RNN` and xLSTM's sLSTM evaluated by `RNN`, same results.

    The new layers take and return what the old ones do: unbatched and packed input, states in and
    out, layers, directions, dropout between layers. They use the very same parameters, so training
    the one trains the other, and an optimiser made before goes on. These have the names they had
    (`weight_hh_l0`), to read and to set, in `named_parameters()` and in `state_dict()`, so that
    checkpoints fit either, and `torch.nn.utils.parametrize` takes them. Hooks of a replaced layer
    stay with it.

    Of the package `xlstm` (NX-AI) it is the recurrence that is replaced, the `sLSTMCell` with
    `backend="vanilla"`; convolution, gates and norm around it stay as they are.

    Args:
        module: One of these layers, or any module that contains some.
        solver: See `RNN`.
        backend: See `RNN`.
        checkpoint_every: See `RNN`.

    Returns:
        For a layer, a new one. For anything else `module` itself, with every such layer in it
        replaced; subclasses of them, whose `forward` may differ, are left alone.

    Raises:
        ValueError: There is no such layer, or one that has no cell: an `nn.LSTM` with `proj_size`,
            an sLSTM with other settings than the paper's, or weights that hooks compute. Nothing
            has been replaced then.

    Example:
        >>> gru = nn.GRU(16, 32, num_layers=2, batch_first=True)
        >>> x = torch.randn(4, 50, 16)
        >>> torch.allclose(parallelize(gru)(x)[0], gru(x)[0], atol=1e-5)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"parallelize takes an nn.Module, got a {type(module).__name__}.")
    found = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if _kind_of(layer) in _ADAPTERS
    }
    if not found:
        raise ValueError(
            f"{type(module).__name__} is and contains no nn.GRU, nn.LSTM or nn.RNN, and no "
            "sLSTMCell of xlstm (subclasses and what was parallelized before are left alone); wrap "
            "a cell as pararnn.RNN(cell)."
        )
    made = {
        layer: _ADAPTERS[_kind_of(layer)](
            layer, name, solver=solver, backend=backend, checkpoint_every=checkpoint_every
        )
        for name, layer in found.items()
    }
    for name, layer in found.items():
        if layer is module:
            return made[layer]
        module.set_submodule(name, made[layer])
    return module


class Parallelized(Lender, StackedRNN):
    """A layer made by `parallelize`, with the arguments, results and parameters of the original."""

    def __init__(
        self,
        original: nn.Module,
        name: str = "",
        *,
        solver: Solver | None = None,
        backend: str = "auto",
        checkpoint_every: int | None = None,
    ) -> None:
        assert isinstance(original, nn.RNNBase)
        called = title(original, name)
        if original.proj_size:
            raise ValueError(
                f"{called} has proj_size={original.proj_size}, which nn.LSTMCell has not; use "
                "proj_size=0 and an nn.Linear after it."
            )
        suffixes = [
            f"_l{layer}{direction}"
            for layer in range(original.num_layers)
            for direction in (["", "_reverse"] if original.bidirectional else [""])
        ]
        super().__init__(
            [
                RNN(
                    _cell(original, suffix, called),
                    solver=solver,
                    backend=backend,
                    checkpoint_every=checkpoint_every,
                )
                for suffix in suffixes
            ],
            batch_first=original.batch_first,
            dropout=original.dropout,
            bidirectional=original.bidirectional,
        )
        self.mode, self.bias, self.proj_size = original.mode, original.bias, 0
        self.train(original.training)
        names = {
            weight + suffix: (i, weight)
            for i, suffix in enumerate(suffixes)
            for weight in _weights(original)
        }
        self._lend_from(original, names)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        reset_state: State | None = None,
    ) -> tuple[Any, State]:
        """See `forward` of the original; see `StackedRNN` for further arguments."""
        self._lend_to_cells()
        return super().forward(input, hx, resets, cu_seqlens, reset_state=reset_state)

    def step(self, x_t: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See `StackedRNN.step`."""
        self._lend_to_cells()
        return super().step(x_t, state)

    def plan(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> ByLayer[Plan]:
        """See `StackedRNN.plan`."""
        self._lend_to_cells()
        return super().plan(shape, dtype)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of every layer and direction."""
        names, count = list(self._names), len(self._names) // len(self.layers)
        weights = [getattr(self, name) for name in names]
        return [weights[i : i + count] for i in range(0, len(weights), count)]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for weights in self.all_weights for weight in weights]

    def reset_parameters(self) -> None:
        """Draw the weights anew, as the original does."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing; code written for the original may call it."""

    def _packed(self, packed: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        """All sequences step together, as in the original; they end together, padded in front."""
        device = packed.data.device
        numbers = packed._replace(data=torch.arange(len(packed.data), device=device))
        left, lengths = pad_packed_sequence(numbers, batch_first=True)
        time = torch.arange(left.shape[1], device=device)
        begins = left.shape[1] - lengths.to(device).unsqueeze(1)
        padding = time < begins
        where = left.gather(1, torch.where(padding, time, time - begins))
        backwards = torch.where(padding, time, begins + left.shape[1] - 1 - time)
        y, last = self._run(packed.data[where], None, time <= begins, None, state, backwards)
        return packed._replace(data=y[~padding][where[~padding].argsort()]), last


def _weights(layer: nn.RNNBase) -> list[str]:
    return ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]


def _cell(layer: nn.RNNBase, suffix: str, called: str) -> nn.RNNCellBase:
    """A cell with one layer's and direction's parameters, which have the same order of gates."""
    kind = parametrize.type_before_parametrizations(layer)
    options: dict[str, Any] = {"nonlinearity": layer.nonlinearity} if kind is nn.RNN else {}
    check_weights(layer, [name + suffix for name in _weights(layer)], called)
    size = getattr(layer, f"weight_ih{suffix}").shape[1]
    cell = _CELLS[kind](size, layer.hidden_size, bias=layer.bias, device="meta", **options)
    for name in _weights(layer):
        lend(layer, name + suffix, cell, name)
    return cell


def _kind_of(layer: nn.Module) -> str:
    """The full name of a layer's class: it tells layers of packages that nobody has imported."""
    kind = parametrize.type_before_parametrizations(layer)
    return f"{kind.__module__}.{kind.__qualname__}"


_ADAPTERS: dict[str, Callable[..., nn.Module]] = {
    **{f"{kind.__module__}.{kind.__qualname__}": Parallelized for kind in _CELLS},
    "xlstm.blocks.slstm.cell.sLSTMCell_vanilla": ParallelSLSTM,
    "xlstm.blocks.slstm.cell.sLSTMCell_cuda": ParallelSLSTM,  # which says what to do
}
