"""`parallelize`: PyTorch's recurrent layers, with their weights, evaluated by `RNN`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pararnn.layers.rnn import RNN, State
from pararnn.layers.stacked import StackedRNN
from pararnn.solvers.settings import Solver

_CELLS: dict[type[nn.Module], type[nn.RNNCellBase]] = {
    nn.GRU: nn.GRUCell,
    nn.LSTM: nn.LSTMCell,
    nn.RNN: nn.RNNCell,
}


def parallelize(
    module: nn.Module, *, solver: Solver | None = None, backend: str = "auto"
) -> nn.Module:
    """Have `nn.GRU`, `nn.LSTM` and `nn.RNN` evaluated by `RNN`, with the same results.

    The new layers take and return what the old ones do: unbatched and packed input, states in and
    out, layers, directions, dropout between layers. They use the very same parameters, so training
    the one trains the other, and an optimiser made before goes on. `state_dict()` has the keys of
    the original in both directions, so checkpoints fit either; `named_parameters()` names them as
    the cells do (`layers.0.cell.weight_ih`). Hooks of a replaced layer stay with it.

    Args:
        module: One of these layers, or any module that contains some.
        solver: See `RNN`.
        backend: See `RNN`.

    Returns:
        For a layer, a new one. For anything else `module` itself, with every such layer in it
        replaced; subclasses of them, whose `forward` may differ, are left alone.

    Raises:
        ValueError: There is no such layer, or one that has no cell: an `nn.LSTM` with `proj_size`,
            or weights that are computed (parametrisations). Nothing has been replaced then.

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
        if type(layer) in _CELLS
        or (isinstance(layer, nn.RNNBase) and parametrize.is_parametrized(layer))
    }
    if not found:
        raise ValueError(
            f"{type(module).__name__} is and contains no nn.GRU, nn.LSTM or nn.RNN (subclasses and "
            "what was parallelized before are left alone); wrap a cell as pararnn.RNN(cell)."
        )
    made = {
        layer: Parallelized(layer, name, solver=solver, backend=backend)
        for name, layer in found.items()
    }
    for name, layer in found.items():
        if layer is module:
            return made[layer]
        module.set_submodule(name, made[layer])
    return module


class Parallelized(StackedRNN):
    """What `parallelize` makes of a layer: the same arguments and results, the same parameters."""

    def __init__(
        self,
        original: nn.Module,
        name: str = "",
        *,
        solver: Solver | None = None,
        backend: str = "auto",
    ) -> None:
        assert isinstance(original, nn.RNNBase)
        called = f"{type(original).__name__}{f' {name!r}' if name else ''}"
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
                RNN(_cell(original, suffix, called), solver=solver, backend=backend)
                for suffix in suffixes
            ],
            batch_first=original.batch_first,
            dropout=original.dropout,
            bidirectional=original.bidirectional,
        )
        self.bias = original.bias
        self.train(original.training)
        self._names = {  # the cells' and the original's
            f"layers.{i}.cell.{weight}": weight + suffix
            for i, suffix in enumerate(suffixes)
            for weight in _weights(original)
        }
        self.register_state_dict_post_hook(_to_original_names)
        self.register_load_state_dict_pre_hook(_from_original_names)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        reset_state: State | None = None,
    ) -> tuple[Any, State]:
        """As `forward` of the original; what it does not have, as of `StackedRNN`."""
        return super().forward(input, hx, resets, cu_seqlens, reset_state=reset_state)

    def __getattr__(self, name: str) -> Any:
        """A parameter by the name that the original has for it."""
        for ours, theirs in self.__dict__.get("_names", {}).items():
            if theirs == name:
                return self.get_parameter(ours)
        return super().__getattr__(name)

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
    options = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    weights = {name: layer._parameters.get(name + suffix) for name in _weights(layer)}
    computed = [name + suffix for name, weight in weights.items() if weight is None]
    if computed:
        raise ValueError(
            f"{computed[0]} of {called} is not a parameter but computed; remove the "
            "parametrisation first."
        )
    size = weights["weight_ih"].shape[1]  # type: ignore[union-attr]
    cell = _CELLS[type(layer)](size, layer.hidden_size, bias=layer.bias, device="meta", **options)
    for name, weight in weights.items():
        setattr(cell, name, weight)
    return cell


def _to_original_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    assert isinstance(module, Parallelized)
    for ours, theirs in module._names.items():
        state_dict[prefix + theirs] = state_dict.pop(prefix + ours)


def _from_original_names(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    assert isinstance(module, Parallelized)
    for ours, theirs in module._names.items():
        if prefix + theirs in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
