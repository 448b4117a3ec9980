"""The sizes of a cell's state: given by the user, declared by the cell, or found by trial."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pararnn._whole import check_whole
from pararnn._words import counted
from pararnn.layers.arguments import describe, shape_of
from pararnn.tracing.capture import how_to_return, snapshot
from pararnn.tracing.modes import uncompiled
from pararnn.tracing.packed import Shape
from pararnn.tracing.parametrised import computed, given

_MOST_COMPONENTS = 8
_TRIAL_ROWS = 11  # more than components, so that a cell cannot unpack a tensor as its tuple


class UnknownSizes(ValueError):
    """The cell failed on components of equal size; its components may differ in size."""


class Sizes:
    """The known shapes of a cell's state.

    Every method takes the cell, since it may declare shapes itself and may change them.

    Args:
        hidden_size: Channels of each component, or a tuple of them, as given by the user, or None.
        num_components: Tensors in the state, as given by the user, or None.
        state_shape: Shape of the state, or a tuple of the shapes of its tensors, as given by the
            user, or None.
    """

    def __init__(
        self,
        hidden_size: int | tuple[int, ...] | None,
        num_components: int | None,
        state_shape: Shape | tuple[Shape, ...] | None = None,
    ) -> None:
        passed = {
            "hidden_size": hidden_size,
            "num_components": num_components,
            "state_shape": state_shape,
        }
        self._given = {name: size for name, size in passed.items() if size is not None}
        _check_hidden_size(hidden_size)
        if num_components is not None:
            check_whole(num_components=num_components)
            if num_components < 1:
                raise ValueError(f"num_components is {num_components}; it must be at least 1.")
        if hidden_size is not None and state_shape is not None:
            raise ValueError(
                f"hidden_size={hidden_size} and state_shape={state_shape} were both passed; "
                "hidden_size=n is short for state_shape=(n,), so pass one."
            )
        self._num_components = num_components
        self._size = _size(hidden_size, state_shape, num_components)  # given or learnt

    def num_components(self, cell: nn.Module) -> int:
        """Tensors in the state.

        Raises:
            TypeError: Their number is not known.
        """
        count = self._given.get("num_components") or getattr(cell, "num_components", None)
        size = self._known_size(cell)
        if count is None:
            count = len(size) if isinstance(size, tuple) else self._num_components  # learnt
        if not isinstance(count, int):
            raise TypeError(
                f"{type(cell).__name__} does not say how many tensors its state has; call "
                "the layer once, or set self.num_components = ... in the cell."
            )
        return count

    def of(self, cell: nn.Module) -> tuple[Shape, ...]:
        """The shape of every tensor in the state, without the batch.

        Raises:
            TypeError: They are not known.
            ValueError: There are more or fewer of them than components.
        """
        size = self._known_size(cell)
        if not isinstance(size, tuple):
            return ((self._channels(cell),),) * self.num_components(cell)
        count = self.num_components(cell)
        if len(size) != count:
            shown = tuple(s[0] for s in size) if all(len(s) == 1 for s in size) else size
            name = "hidden_size" if all(len(s) == 1 for s in size) else "state_shape"
            raise ValueError(
                f"{name} is {shown} for {counted(count, 'component')}; give that of each of them."
            )
        return size

    def _channels(self, cell: nn.Module) -> int:
        """Channels of the first component.

        Raises:
            TypeError: The number is not known.
        """
        size = self._known_size(cell)
        if isinstance(size, tuple):
            return math.prod(size[0])
        if size is None:
            name = type(cell).__name__
            raise TypeError(
                f"{name} does not say how large its state is; set self.hidden_size = ... or "
                f"self.state_shape = (...) in {name}.__init__, or pass RNN(cell, hidden_size=...), "
                "or pass a state at the first call."
            )
        return size

    def _known_size(self, cell: nn.Module) -> int | tuple[Shape, ...] | None:
        """Channels of each tensor, or the shapes of all of them: given, learnt or declared."""
        if self._size is not None:
            return self._size
        own = [getattr(cell, name, None) for name in ("hidden_size", "state_shape")]
        count = self._num_components or getattr(cell, "num_components", None)
        return _size(None if own[1] is not None else own[0], own[1], count)

    def is_known(self, cell: nn.Module) -> bool:
        """Whether shapes were given, or the cell declares them."""
        return self._known_size(cell) is not None

    def learn(self, cell: nn.Module, shapes: tuple[Shape, ...], is_traced: bool) -> None:
        """Learn, from the cell or from a state, the sizes that the user did not give.

        Args:
            cell: The cell.
            shapes: Of the tensors of a state; empty without a state.
            is_traced: Whether the cell has been traced already.
        """
        known = self._known_size(cell)
        if self._num_components is None:
            own = getattr(cell, "num_components", None)
            count = len(known if isinstance(known, tuple) else shapes) or None
            self._num_components = own if isinstance(own, int) else count
        if not is_traced and len(set(shapes)) > 1 and self._may_differ(cell):
            self._size = shapes
        elif known is None and shapes:
            plain = len(set(shapes)) == 1 and len(shapes[0]) == 1
            self._size = shapes[0][0] if plain else shapes

    def _may_differ(self, cell: nn.Module) -> bool:
        """Whether several components may differ in size: not all shapes are known yet."""
        return (self._num_components or 1) > 1 and not isinstance(self._known_size(cell), tuple)

    def refuse(self, cell: nn.Module, error: Exception) -> None:
        """Explain an error that the cell raised, if the sizes may be the cause.

        Raises:
            ValueError: The cell does not declare the sizes that it got.
            UnknownSizes: Its components may differ in size.
        """
        hint, shapes, name = self._hint(cell), self.of(cell), type(cell).__name__
        learnt = self._size is not None and not self._given.keys() & {"hidden_size", "state_shape"}
        if not hint and (learnt or isinstance(self._known_size(cell), tuple)):
            shown = " and ".join(shape_of("N", *shape) for shape in shapes)
            form = "tensors of shape" if len(shapes) > 1 else "shape"
            said = "as was passed" if learnt or self._given else "as it declares"
            hint = f"Its state had {form} {shown} for N rows, {said}; is that right?"
        if learnt:
            self._size = None  # the state may have been wrong
        shapes_do_not_fit = self._may_differ(cell) and isinstance(error, RuntimeError)
        if hint and not (shapes_do_not_fit and self._given.keys() == {"num_components"}):
            raise ValueError(f"{name} raised: {error}. {hint}") from error
        if shapes_do_not_fit:
            passed = ", as was passed," if "num_components" in self._given else ""
            raise UnknownSizes(
                f"{name} raised: {error}. Its {len(shapes)} components{passed} had {shapes[0][0]} "
                "channels each; if they differ, set self.hidden_size = (..., ...) in the cell, or "
                "pass a state."
            ) from error

    def _hint(self, cell: nn.Module) -> str:
        """Advice about sizes that the user gave but the cell does not declare."""
        name, hints = type(cell).__name__, []
        for option, size in self._given.items():
            names = [option] if option == "num_components" else ["state_shape", "hidden_size"]
            own = {n: getattr(cell, n, None) for n in names}
            said = [f"says self.{n} = {size}" for n, size in own.items() if size is not None]
            says = said[0] if said else "does not say it" if option == "num_components" else ""
            if says and own.get(option) != size:
                hints.append(f"{option}={size} was passed to RNN and {name} {says}; leave it out?")
        return " ".join(hints)

    def find_components(
        self, cell: nn.Module, features: tuple[int, ...], kind: torch.dtype
    ) -> None:
        """Try the cell on 1, 2, ... components, unless their number is known.

        The number is right if the cell returns a state of the same form.

        Args:
            cell: The cell.
            features: Shape of one input.
            kind: Type of the input.

        Raises:
            TypeError: No number is right.
        """
        if self._num_components is not None:
            return
        size, now = self._channels(cell), snapshot(cell)
        device = now.device
        x = torch.zeros(_TRIAL_ROWS, *features, dtype=kind, device=device)
        failures: list[str] = []
        advice, first = "", None
        for count in range(1, _MOST_COMPONENTS + 1):
            zeros = (torch.zeros(_TRIAL_ROWS, size, dtype=now.dtype, device=device),) * count
            try:
                with (
                    torch.no_grad(),
                    torch.random.fork_rng([device] if device.type == "cuda" else []),
                    given(cell, computed(cell)),
                    uncompiled(),
                ):
                    new = cell(x, zeros if count > 1 else zeros[0])
            except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
                failures.append(f"raised {type(error).__name__}: {error}")
                first = first or error
                continue
            parts = new if isinstance(new, tuple) else (new,)
            whole = isinstance(new, tuple) == (count > 1) and len(parts) == count
            alike = (isinstance(p, torch.Tensor) and p.shape == zeros[0].shape for p in parts)
            if whole and all(alike):
                self._num_components = count
                return
            failures.append(f"returned {describe(new)}")
            advice = advice or how_to_return(new, count)
        name, shape = type(cell).__name__, ", ".join(map(str, ("N", *features)))
        seen = [f"with {n} it {f}" for n, f in enumerate(failures, 1)]
        shown = f"it {failures[0]}" if len(set(failures)) == 1 else "; ".join(seen[:3])
        raise TypeError(
            f"{name}.forward(x, state) was tried on x of shape ({shape}) and 1 to "
            f"{_MOST_COMPONENTS} state tensors of shape (N, {size}) with N = {_TRIAL_ROWS}, and "
            f"never returned the new state in the same form: {shown}.{advice} "
            + (
                self._hint(cell)
                or f"If the cell is right, set self.num_components = ... in {name}.__init__, or "
                "pass RNN(cell, num_components=...)."
            )
        ) from first


def _size(hidden_size: Any, state_shape: Any, count: Any) -> int | tuple[Shape, ...] | None:
    """Channels of each tensor of a state, or the shapes of all; None if nothing is said.

    Args:
        hidden_size: Channels of each tensor, or a tuple of them.
        state_shape: A shape, or a tuple of shapes.
        count: Tensors in the state; if it is not known, one shape means one tensor.

    Raises:
        TypeError: `state_shape` is something else.
        ValueError: A size is less than 1.
    """
    if isinstance(state_shape, int):
        state_shape = (state_shape,)
    if isinstance(state_shape, (tuple, list)):
        if all(isinstance(n, int) for n in state_shape):
            shapes = (tuple(state_shape),) * (count if isinstance(count, int) else 1)
        elif all(isinstance(s, (tuple, list)) for s in state_shape):
            shapes = tuple(map(tuple, state_shape))
        else:
            raise TypeError(_no_shape(state_shape))
    elif state_shape is not None:
        raise TypeError(_no_shape(state_shape))
    elif isinstance(hidden_size, (tuple, list)) and hidden_size:
        shapes = tuple((n,) for n in hidden_size)
    else:
        return hidden_size if isinstance(hidden_size, int) and hidden_size > 0 else None
    if not all(isinstance(n, int) and n > 0 for shape in shapes for n in shape):
        name, seen = ("hidden_size", hidden_size)
        if state_shape is not None:
            name, seen = ("state_shape", state_shape)
        raise ValueError(f"{name} is {seen}; sizes must be whole numbers of at least 1.")
    return shapes


def _check_hidden_size(size: Any) -> None:
    """Refuse what was passed as `hidden_size` but is none."""
    for n in size if isinstance(size, (tuple, list)) else () if size is None else (size,):
        if not isinstance(n, int):
            raise TypeError(
                f"hidden_size is {size!r}; it must be a whole number (an int), or a tuple of them, "
                "one for each tensor in the state."
            )
        if n < 1:
            raise ValueError(f"hidden_size is {size}; sizes must be whole numbers of at least 1.")


def _no_shape(seen: Any) -> str:
    return (
        f"state_shape is {seen!r}; it must be a shape without the batch, of whole numbers (int), "
        "such as (4, 8), or a tuple of shapes, such as ((4, 8), (4,)), one for each tensor in the "
        "state."
    )
