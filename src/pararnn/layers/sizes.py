"""The sizes of a cell's state: given by the user, declared by the cell, or found by trial."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pararnn.layers.arguments import describe
from pararnn.tracing.capture import snapshot
from pararnn.tracing.modes import uncompiled
from pararnn.tracing.parametrised import computed, given

_MOST_COMPONENTS = 8
_TRIAL_ROWS = 11  # more than components, so that a cell cannot unpack a tensor as its tuple


class UnknownSizes(ValueError):
    """The cell failed on components of equal size; its components may differ in size."""


class Sizes:
    """The known sizes of a cell's state.

    Every method takes the cell, since it may declare sizes itself and may change them.

    Args:
        hidden_size: Channels of each component, or a tuple of them, as given by the user, or None.
        num_components: Tensors in the state, as given by the user, or None.
    """

    def __init__(
        self, hidden_size: int | tuple[int, ...] | None, num_components: int | None
    ) -> None:
        self._hidden_size, self._num_components = hidden_size, num_components
        passed = {"hidden_size": hidden_size, "num_components": num_components}
        self._given = {name: size for name, size in passed.items() if size is not None}

    def hidden_size(self, cell: nn.Module) -> int:
        """Channels of the first component of the state, which is the output.

        Raises:
            TypeError: The number is not known.
        """
        size = self._known_size(cell)
        size = size[0] if isinstance(size, tuple) and size else size
        if not isinstance(size, int) or size < 1:
            name = type(cell).__name__
            raise TypeError(
                f"{name} does not say how large its state is; set self.hidden_size = ... in "
                f"{name}.__init__, or pass RNN(cell, hidden_size=...), or pass a state at the "
                "first call."
            )
        return size

    def num_components(self, cell: nn.Module) -> int:
        """Tensors in the state.

        Raises:
            TypeError: Their number is not known.
        """
        count = self._num_components or getattr(cell, "num_components", None)
        size = self._known_size(cell)
        count = len(size) if count is None and isinstance(size, tuple) else count
        if not isinstance(count, int):
            raise TypeError(
                f"{type(cell).__name__} does not say how many tensors its state has; call "
                "the layer once, or set self.num_components = ... in the cell."
            )
        return count

    def of(self, cell: nn.Module) -> tuple[int, ...]:
        """Channels of every component of the state.

        Raises:
            TypeError: They are not known.
            ValueError: There are more or fewer of them than components.
        """
        size = self._known_size(cell)
        if not isinstance(size, tuple):
            return (self.hidden_size(cell),) * self.num_components(cell)
        count = self.num_components(cell)
        if len(size) != count or not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(
                f"hidden_size is {size} for {count} components; give the channels of each of them."
            )
        return size

    def _known_size(self, cell: nn.Module) -> Any:
        """Channels as the user gave them, as learnt from a state, or as the cell declares them."""
        return self._hidden_size or getattr(cell, "hidden_size", None)

    def is_known(self, cell: nn.Module) -> bool:
        """Whether channels were given, or the cell declares them."""
        return bool(self._hidden_size) or _declares(cell)

    def learn(self, cell: nn.Module, sizes: tuple[int, ...], is_traced: bool) -> None:
        """Learn, from the cell or from a state, the sizes that the user did not give.

        Args:
            cell: The cell.
            sizes: Channels of the components of a state; empty without a state.
            is_traced: Whether the cell has been traced already.
        """
        if self._num_components is None:
            own, known = getattr(cell, "num_components", None), self._known_size(cell)
            count = len(known if isinstance(known, tuple) else sizes) or None
            self._num_components = own if isinstance(own, int) else count
        if not is_traced and len(set(sizes)) > 1 and self._may_differ(cell):
            self._hidden_size = sizes
        elif self._hidden_size is None and not _declares(cell) and sizes:
            self._hidden_size = sizes[0]

    def _may_differ(self, cell: nn.Module) -> bool:
        """Whether several components may differ in size: no tuple of sizes is known yet."""
        return (self._num_components or 1) > 1 and not isinstance(self._known_size(cell), tuple)

    def refuse(self, cell: nn.Module, error: Exception) -> None:
        """Explain an error that the cell raised, if the sizes may be the cause.

        Raises:
            ValueError: The cell does not declare the sizes that it got.
            UnknownSizes: Its components may differ in size.
        """
        hint, sizes, name = self._hint(cell), self.of(cell), type(cell).__name__
        if isinstance(self._hidden_size, tuple) and "hidden_size" not in self._given:
            self._hidden_size = None  # learnt from a state that may have been wrong
            hint = hint or f"Its state had components of {' and '.join(map(str, sizes))} channels."
        if hint:
            raise ValueError(f"{name} raised: {error}. {hint}") from error
        if self._may_differ(cell) and isinstance(error, RuntimeError):
            raise UnknownSizes(
                f"{name} raised: {error}. Its {len(sizes)} components had {sizes[0]} channels "
                "each; if they differ, set self.hidden_size = (..., ...) in the cell, or pass a "
                "state."
            ) from error

    def _hint(self, cell: nn.Module) -> str:
        """Advice about sizes that the user gave but the cell does not declare."""
        name, hints = type(cell).__name__, []
        for option, size in self._given.items():
            own = getattr(cell, option, None)
            if own != size and (own is not None or option == "num_components"):
                says = "does not say it" if own is None else f"says self.{option} = {own}"
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
        size, now = self.hidden_size(cell), snapshot(cell)
        device = now.device
        x = torch.zeros(_TRIAL_ROWS, *features, dtype=kind, device=device)
        failures: list[str] = []
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
                continue
            parts = new if isinstance(new, tuple) else (new,)
            whole = isinstance(new, tuple) == (count > 1) and len(parts) == count
            alike = (isinstance(p, torch.Tensor) and p.shape == zeros[0].shape for p in parts)
            if whole and all(alike):
                self._num_components = count
                return
            failures.append(f"returned {describe(new)}")
        name, shape = type(cell).__name__, ", ".join(map(str, ("N", *features)))
        seen = [f"with {n} it {f}" for n, f in enumerate(failures, 1)]
        shown = f"it {failures[0]}" if len(set(failures)) == 1 else "; ".join(seen[:3])
        raise TypeError(
            f"{name}.forward(x, state) was tried on x of shape ({shape}) and 1 to "
            f"{_MOST_COMPONENTS} state tensors of shape (N, {size}) with N = {_TRIAL_ROWS}, and "
            f"never returned the new state in the same form: {shown}. "
            + (
                self._hint(cell)
                or f"If the cell is right, set self.num_components = ... in {name}.__init__, or "
                "pass RNN(cell, num_components=...)."
            )
        )


def _declares(cell: nn.Module) -> bool:
    return isinstance(getattr(cell, "hidden_size", None), (int, tuple))
