"""Classes whose `__init__` is called after them in Python's own messages, also if inherited."""

import types
from typing import Any


class NamedInit:
    """A base of classes that only inherit `__init__`.

    Python says "ParaGRUCell.__init__() got an unexpected keyword argument" and not the name of the
    class that wrote it, which a user has never seen.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inherited = cls.__init__
        if "__init__" in vars(cls) or not isinstance(inherited, types.FunctionType):
            return
        own = types.FunctionType(
            inherited.__code__,
            inherited.__globals__,
            inherited.__name__,
            inherited.__defaults__,
            inherited.__closure__,
        )
        for name in ("__kwdefaults__", "__annotations__", "__doc__", "__module__"):
            setattr(own, name, getattr(inherited, name))
        own.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = own  # type: ignore[method-assign]
