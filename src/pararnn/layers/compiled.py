"""Makes torch.compile recompile a call after changes that its own guards do not see."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any


def valid_while_same(owner: Any, key: Callable[[Any], object]) -> None:
    """Add a guard: the code that is being compiled runs only for owners with the key of this one.

    Call it from code whose result becomes a constant of the compiled program. PyTorch has no public
    way to add a guard. The guard also asks other owners that run the same code, such as another
    block of a model, for their keys.

    Args:
        owner: An object that the compiler has seen.
        key: Key of an owner; equal keys mean equal results. It may be None before the first trace.
    """
    symbolic = sys.modules.get("torch._dynamo.symbolic_convert")
    translator = getattr(getattr(symbolic, "tls", None), "current_tx", None)
    if translator is None or translator.output.export:
        return  # an exported program is never recompiled
    from torch._dynamo.guards import install_guard

    first = weakref.ref(owner)

    def is_same(builder: Any, guard: Any) -> None:
        expected = key(first())
        assert expected is not None
        check = builder.get_guard_manager(guard).add_lambda_guard
        arguments = (lambda other: key(other) == expected, ["its cell is as it was traced"])
        try:
            check(*arguments, None)
        except TypeError:  # the signature in PyTorch 2.9
            check(*arguments)

    seen = translator.output.side_effects.id_to_variable.get(id(owner))
    if seen is None:
        raise RuntimeError(
            f"torch.compile treats {type(owner).__name__} in a way in which it would not notice a "
            "change of its cell; leave torch._dynamo.config.inline_inbuilt_nn_modules at True."
        )
    install_guard(seen.source.make_guard(is_same))
