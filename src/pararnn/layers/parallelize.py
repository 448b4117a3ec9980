"""`parallelize`: PyTorch's recurrent layers, with their weights, evaluated by `RNN`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from pararnn.layers.rnn import RNN, State
from pararnn.layers.stacked import StackedRNN
from pararnn.planning.settings import Solver

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
    the one trains the other, and an optimiser made before goes on. These have the names they had
    (`weight_hh_l0`), to read and to set, in `named_parameters()` and in `state_dict()`, so that
    checkpoints fit either, and `torch.nn.utils.parametrize` takes them. Hooks of a replaced layer
    stay with it.

    Args:
        module: One of these layers, or any module that contains some.
        solver: See `RNN`.
        backend: See `RNN`.

    Returns:
        For a layer, a new one. For anything else `module` itself, with every such layer in it
        replaced; subclasses of them, whose `forward` may differ, are left alone.

    Raises:
        ValueError: There is no such layer, or one that has no cell: an `nn.LSTM` with `proj_size`,
            or weights that hooks compute. Nothing has been replaced then.

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
        if parametrize.type_before_parametrizations(layer) in _CELLS
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
    """A layer made by `parallelize`, with the arguments, results and parameters of the original."""

    def __init__(
        self,
        original: nn.Module,
        name: str = "",
        *,
        solver: Solver | None = None,
        backend: str = "auto",
    ) -> None:
        assert isinstance(original, nn.RNNBase)
        kind = parametrize.type_before_parametrizations(original)
        called = f"{kind.__name__}{f' {name!r}' if name else ''}"
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
        self.mode, self.bias, self.proj_size = original.mode, original.bias, 0
        self.train(original.training)
        self._names = {
            weight + suffix: (i, weight)
            for i, suffix in enumerate(suffixes)
            for weight in _weights(original)
        }
        for name in self._names:
            _lend(original, name, self, name)
        self._lend_to_cells()
        self.register_state_dict_post_hook(_without_cells)
        self.register_load_state_dict_pre_hook(_with_cells)
        self.register_load_state_dict_post_hook(_after_loading)

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

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See `nn.Module.register_parameter`; a weight becomes that of its cell."""
        super().register_parameter(name, param)
        if "_names" in vars(self):
            self._lend_to_cells()

    def __delattr__(self, name: str) -> None:
        """Take a weight from its cell too, which gets what comes in its place at the next call."""
        super().__delattr__(name)
        if name in self._names:
            i, weight = self._names[name]
            _forget(self._cells()[i], weight)

    def _cells(self) -> list[Any]:
        return [layer._modules["cell"] for layer in self.layers]

    def _lend_to_cells(self) -> bool:
        """Share the weights of this module, under the names of the original, with the cells."""
        cells = self._cells()
        for name, (i, weight) in self._names.items():
            if not _is_lent(self, name, cells[i], weight):
                _lend(self, name, cells[i], weight)
                self._modules["layers"] = self._modules.pop("layers")  # whose names come last
        return True

    vars()["_lend_to_cells"]._dynamo_marked_constant = True  # the compiler calls it as it is

    def _apply(self, fn: Any, recurse: bool = True) -> Parallelized:
        self._lend_to_cells()
        super()._apply(fn, recurse)
        self._lend_to_cells()
        return self

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
    for name in _weights(layer):
        is_there = layer._parameters.get(name + suffix) is not None
        if not is_there and not parametrize.is_parametrized(layer, name + suffix):
            raise ValueError(
                f"{name}{suffix} of {called} is not a parameter but computed by a hook (the older "
                "torch.nn.utils.weight_norm?); remove it, or use torch.nn.utils.parametrizations."
            )
    size = getattr(layer, f"weight_ih{suffix}").shape[1]
    cell = _CELLS[kind](size, layer.hidden_size, bias=layer.bias, device="meta", **options)
    for name in _weights(layer):
        _lend(layer, name + suffix, cell, name)
    return cell


def _lend(owner: nn.Module, name: str, to: nn.Module, weight: str) -> None:
    """Share a weight of one module with another: its parameter, or its parametrisation."""
    _forget(to, weight)
    parameter = owner._parameters.get(name)
    if parameter is not None:
        to.register_parameter(weight, parameter)
    elif not parametrize.is_parametrized(owner, name):
        if name in vars(owner):  # as hooks set it at every call
            vars(to)[weight] = vars(owner)[name]
    else:
        if not parametrize.is_parametrized(to):
            parametrize._inject_new_class(to)
            to.parametrizations = nn.ModuleDict()
        parametrize._inject_property(to, weight)
        _parametrisations(to)[weight] = _parametrisations(owner)[name]


def _is_lent(owner: nn.Module, name: str, to: nn.Module, weight: str) -> bool:
    parameter = owner._parameters.get(name)
    if parameter is not None:
        return to._parameters.get(weight) is parameter
    if not parametrize.is_parametrized(owner, name):
        return weight not in to._parameters and vars(to).get(weight) is vars(owner).get(name)
    both = parametrize.is_parametrized(to, weight)
    return both and _parametrisations(to)[weight] is _parametrisations(owner)[name]


def _parametrisations(module: nn.Module) -> nn.ModuleDict:
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return found


def _forget(module: nn.Module, weight: str) -> None:
    """Remove a weight, of any kind."""
    if parametrize.is_parametrized(module, weight):
        del _parametrisations(module)[weight]
        delattr(type(module), weight)
        if not _parametrisations(module):
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]
    module._parameters.pop(weight, None)
    vars(module).pop(weight, None)


def _without_cells(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    for name in [n for n in state_dict if n.startswith(f"{prefix}layers.")]:
        del state_dict[name]


def _with_cells(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, Parallelized)
    module._lend_to_cells()
    for name, (i, weight) in module._names.items():
        computed, cell = f"{prefix}parametrizations.{name}.", f"{prefix}layers.{i}.cell."
        for key in [k for k in state_dict if k == prefix + name or k.startswith(computed)]:
            state_dict[cell + key.removeprefix(prefix).replace(name, weight, 1)] = state_dict[key]


def _after_loading(module: nn.Module, keys: Any) -> None:
    """Report a missing key once, by the name of the original."""
    assert isinstance(module, Parallelized)
    module._lend_to_cells()
    missing = set(keys.missing_keys)
    for name, (i, weight) in module._names.items():
        cell = f"layers.{i}.cell.{weight}"
        keys.missing_keys[:] = [
            key
            for key in keys.missing_keys
            if not (key.endswith(cell) and key.removesuffix(cell) + name in missing)
        ]
