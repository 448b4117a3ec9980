"""Makes modules from generated Triton, and compiles their kernels."""

from __future__ import annotations

import contextvars
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

_lock = threading.Lock()

# Python 3.11 before 3.11.8 and 3.12 before 3.12.2 may raise SystemError where threads parse at the
# same time (github.com/python/cpython/issues/106905), and to compile is to parse.
_PARSES_IN_THREADS = not (3, 11) <= sys.version_info < (3, 11, 8) and not (
    (3, 12) <= sys.version_info < (3, 12, 2)
)

OLDEST = (3, 6)  # Triton 3.5 mixes up constants in tuples of tuples


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def too_old() -> str | None:
    """What keeps this version of Triton from compiling the kernels for a GPU."""
    import triton  # which a machine without a GPU need not have

    if tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST:
        return None
    needed = "install Triton 3.6 or newer, which comes with PyTorch 2.10"
    return f"Triton {triton.__version__} is too old for kernels on a GPU; {needed}"


@functools.cache
def missing(device: str) -> str | None:
    """What keeps Triton from building kernels for devices of a kind, whatever the kernel."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton was not found (it comes with PyTorch for GPUs)"
    if device != "cuda" or interpreted():
        return None
    from triton.runtime import driver  # which a machine without a GPU need not have

    if words := too_old():
        return words
    try:  # this compiles a program of its own
        driver.active.get_current_target()
    except (
        RuntimeError,
        OSError,
        ImportError,
        AssertionError,
        subprocess.SubprocessError,
    ) as error:
        return f"Triton does not work with this GPU: {type(error).__name__}: {error}"
    return None


class _Generated(InspectLoader):
    """Gives a module its text, and others too: Triton reads the text of its functions.

    No file is read or written, so nobody can put something else in its place.
    """

    def __init__(self, source: str, file: str) -> None:
        self._source = source
        self._file = file

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self._file, "exec")


def load(source: str) -> ModuleType:
    """The module of generated source."""
    name = f"pararnn_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    with _lock:
        if name not in sys.modules:
            _imported(name, source)
        return sys.modules[name]


def text_of(function: Any) -> str:
    """The generated source that a function in Triton comes from."""
    module = sys.modules[function.fn.__module__]
    assert isinstance(module.__loader__, _Generated)
    return module.__loader__.get_source(module.__name__)


def _imported(name: str, source: str) -> None:
    file = str(Path(__file__).with_name("generated") / f"{name}.py")  # there is none
    spec = importlib.util.spec_from_loader(name, _Generated(source, file), origin=file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def compile_together(launches: Sequence[Callable[..., None]]) -> None:
    """Compile kernels at the same time; most of it happens without holding Python's lock.

    Args:
        launches: Each compiles what it would run when called with `warmup=True`.
    """
    import triton  # which a machine without a GPU need not have

    mode = getattr(triton, "AsyncCompileMode", None)  # older ones have none
    if len(launches) < 2 or mode is None or interpreted() or not _PARSES_IN_THREADS:
        return

    def compile_all() -> None:
        with ThreadPoolExecutor(len(launches)) as pool, mode(pool):
            for launch in launches:
                launch(warmup=True)

    # In a context of its own: when one does not compile, Triton 3.6 does not leave the mode.
    contextvars.copy_context().run(compile_all)
