"""Has torch.compile compile a call anew when more has changed than it looks at itself."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any


def valid_while_same(owner: Any, key: Callable[[Any], object]) -> None:
    """What is being compiled is run only for owners with the key that this one has in the end.

    Called by code that the compiler is about to take a constant from. The compiler has no public
    way to add to what it checks before it runs what it has compiled. Another owner, at whose call
    it finds the same code (another block of a model), is asked for its own key.

    Args:
        owner: An object that the compiler has seen.
        key: Of an owner; equal keys, equal results. It may be None while there is none yet.
    """
    symbolic = sys.modules.get("torch._dynamo.symbolic_convert")
    translator = getattr(getattr(symbolic, "tls", None), "current_tx", None)
    if translator is None or translator.output.export:
        return  # exported: nothing is compiled anew
    from torch._dynamo.guards import install_guard

    first = weakref.ref(owner)

    def is_same(builder: Any, guard: Any) -> None:
        expected = key(first())
        assert expected is not None
        check = builder.get_guard_manager(guard).add_lambda_guard
        arguments = (lambda other: key(other) == expected, ["its cell is as it was traced"])
        try:
            check(*arguments, None)
        except TypeError:  # as PyTorch 2.9 has it
            check(*arguments)

    seen = translator.output.side_effects.id_to_variable.get(id(owner))
    if seen is None:
        raise RuntimeError(
            f"torch.compile treats {type(owner).__name__} in a way in which it would not notice a "
            "change of its cell; leave torch._dynamo.config.inline_inbuilt_nn_modules at True."
        )
    install_guard(seen.source.make_guard(is_same))
