"""Packages whose contents are loaded when the first of them is used."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def contents_of(module: str, package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that offers what a module imports.

    Args:
        module: All of its names without an underscore are offered.
        package: Whose names they become at the first use.
    """

    def load() -> dict[str, Any]:
        found = {n: v for n, v in vars(importlib.import_module(module)).items() if n[0] != "_"}
        vars(sys.modules[package]).update(found)
        return found

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(load())
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = load()
        if name not in found:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        return found[name]

    def names() -> list[str]:
        load()
        return sorted(vars(sys.modules[package]))

    return get, names
