"""Calls of our operators without PyTorch's dispatcher, which costs as much as a small problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pararnn.tracing.modes import transformed


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a call only computes: nothing traces, records or transforms its operations."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
        or transformed()
        or not all(type(t) in _PLAIN for t in tensors)
    )


_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class Operator:
    """An operator with its derivative, as `torch.library` takes them.

    Attributes:
        name: In `torch.ops.pararnn`.
        run: Its implementation.
        backward: See `torch.library.register_autograd`.
        setup: Likewise, the `setup_context`.
    """

    name: str
    run: Callable[..., list[Tensor]]
    backward: Callable[..., Any]
    setup: Callable[[Any, Any, Any], None] | None = None

    def register(self, library: torch.library.Library, fake: Callable[..., list[Tensor]]) -> None:
        """Register the operator, which `library` defines; `fake` makes results without values."""
        name = f"pararnn::{self.name}"
        library.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=library)
        setup = self.setup
        torch.library.register_autograd(name, self.backward, setup_context=setup, lib=library)

    def __call__(self, *arguments: Any) -> list[Tensor]:
        """Call it with tensors, sequences of tensors, and arguments without gradients."""
        flat, counts = _flat(arguments)
        tensors = [a for a in flat if isinstance(a, Tensor)]
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if not is_plain(tensors) or (tracked and self.setup is None):
            operator: Callable[..., list[Tensor]] = getattr(torch.ops.pararnn, self.name)
            return operator(*arguments)
        return list(_Direct.apply(self, counts, *flat)) if tracked else self.run(*arguments)


def _flat(arguments: Sequence[Any]) -> tuple[list[Any], list[int | None]]:
    """All arguments in one list, and the length of each sequence; None if it was no sequence."""
    flat: list[Any] = []
    counts: list[int | None] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            flat += argument
            counts.append(len(argument))
        else:
            flat.append(argument)
            counts.append(None)
    return flat, counts


def _nested(flat: Sequence[Any], counts: Sequence[int | None]) -> list[Any]:
    nested: list[Any] = []
    first = 0
    for count in counts:
        nested.append(flat[first] if count is None else list(flat[first : first + count]))
        first += 1 if count is None else count
    return nested


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Operator, counts: Sequence[int | None], *flat: Any
    ) -> tuple[Tensor, ...]:
        arguments = _nested(flat, counts)
        found = operator.run(*arguments)
        ctx.operator = operator
        ctx.mark_non_differentiable(found[-1])  # the report
        assert operator.setup is not None
        operator.setup(ctx, arguments, found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, *_flat(ctx.operator.backward(ctx, grads))[0]
