"""Weights that a layer has under names of its own and its cells under theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize


class Lender(nn.Module):
    """A module with weights of its own that the cells of its `layers` compute with.

    They are parameters of the module, under its names, to read and to set, in `named_parameters()`
    and in `state_dict()`, where those of the cells do not show. What sets, deletes, parametrises,
    loads or moves them reaches the cells.
    """

    layers: nn.ModuleList
    _names: dict[str, tuple[int, str]]  # a weight of the module: number of the layer, cell's name

    def _lend_from(self, original: nn.Module, names: dict[str, tuple[int, str]]) -> None:
        """Share weights of another module, under the same names; `layers` are there already."""
        self._names = names
        for name in names:
            lend(original, name, self, name)
        self._lend_to_cells()
        self.register_state_dict_post_hook(_without_cells)
        self.register_load_state_dict_pre_hook(_with_cells)
        self.register_load_state_dict_post_hook(_after_loading)

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
                lend(self, name, cells[i], weight)
                self._modules["layers"] = self._modules.pop("layers")  # whose names come last
        return True

    vars()["_lend_to_cells"]._dynamo_marked_constant = True  # the compiler calls it as it is

    def _apply(self, fn: Any, recurse: bool = True) -> Lender:
        self._lend_to_cells()
        super()._apply(fn, recurse)
        self._lend_to_cells()
        return self


def title(layer: nn.Module, name: str) -> str:
    """What a message calls a layer: its class, and its name in the model if it has one."""
    kind = parametrize.type_before_parametrizations(layer)
    return f"{kind.__name__}{f' {name!r}' if name else ''}"


def check_weights(layer: nn.Module, names: Iterable[str], called: str) -> None:
    """Refuse weights that hooks compute at every call.

    Raises:
        ValueError: One is neither a parameter nor parametrised.
    """
    for name in names:
        is_there = layer._parameters.get(name) is not None
        if not is_there and not parametrize.is_parametrized(layer, name):
            raise ValueError(
                f"{name} of {called} is not a parameter but computed by a hook (the older "
                "torch.nn.utils.weight_norm?); remove it, or use torch.nn.utils.parametrizations."
            )


def lend(owner: nn.Module, name: str, to: nn.Module, weight: str) -> None:
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
    assert isinstance(module, Lender)
    module._lend_to_cells()
    for name, (i, weight) in module._names.items():
        computed, cell = f"{prefix}parametrizations.{name}.", f"{prefix}layers.{i}.cell."
        for key in [k for k in state_dict if k == prefix + name or k.startswith(computed)]:
            state_dict[cell + key.removeprefix(prefix).replace(name, weight, 1)] = state_dict[key]


def _after_loading(module: nn.Module, keys: Any) -> None:
    """Report a missing key once, by the name of the original."""
    assert isinstance(module, Lender)
    module._lend_to_cells()
    missing = set(keys.missing_keys)
    for name, (i, weight) in module._names.items():
        cell = f"layers.{i}.cell.{weight}"
        keys.missing_keys[:] = [
            key
            for key in keys.missing_keys
            if not (key.endswith(cell) and key.removesuffix(cell) + name in missing)
        ]
