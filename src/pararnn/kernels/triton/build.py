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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import InspectLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import Tensor

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


class Launches:
    """What calls have launched, by their form: calls of one form launch the same kernels in order.

    Triton finds what it has compiled by all arguments of a launch and all its constants. Where
    these are tuples of tuples, that is most of the time that Python takes.
    """

    def __init__(self) -> None:
        self._known: dict[Any, dict[int, Any]] = {}

    def of(self, form: Any) -> Launcher:
        """Launches for one call.

        Args:
            form: What arguments of all its kernels follow from; see `form_of`.
        """
        known = self._known.get(form)
        if known is None:
            if len(self._known) >= _MOST_FORMS:
                self._known.clear()
            known = self._known.setdefault(form, {})
        return Launcher(known)


_MOST_FORMS = 256
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class Launcher:
    """Launches the kernels of one call, one after another.

    Args:
        known: What calls of the same form launched, by number; new kernels are put into it.
    """

    def __init__(self, known: dict[int, Any]) -> None:
        self._known = known
        self._number = 0

    @property
    def knows_next(self) -> bool:
        """Whether a call of the form launched the next kernel before."""
        return self._number in self._known

    def launch(self, kernel: Any, grid: tuple[int], given: Mapping[str, Any]) -> None:
        """Launch a kernel on the current device.

        Args:
            kernel: The kernel.
            grid: Its programs.
            given: Arguments and options by name; those of other kernels are left out. With
                `maxnreg` comes `most_spilled`: if a thread spills more numbers to have so few
                registers, it has more.
        """
        values = [given[name] for name in kernel.arg_names]
        number = self._number
        self._number += 1
        if number in self._known:
            self._known[number][grid[0], 1, 1](*values)
            return
        options = {n: given[n] for n in _OPTIONS if n in given}
        named = dict(zip(kernel.arg_names, values, strict=True))
        if interpreted():
            kernel[grid](**named, **options)
            return
        if "maxnreg" in options:
            tried = kernel.warmup(**named, **options, grid=grid)
            assert tried.run  # it is loaded: then one knows
            if tried.n_spills > given["most_spilled"]:
                del options["maxnreg"]
        self._known[number] = kernel[grid](**named, **options)


def form_of(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """What launches depend on of tensors that a call is given: all but values and place."""
    return tuple(
        [
            t if t is None else (t.dtype, t.device, t.shape, t.stride(), t.data_ptr() % 16)
            for t in tensors
        ]
    )


def compile_together(kernels: Sequence[Callable[[], None]]) -> None:
    """Compile kernels at the same time; most of it happens without holding Python's lock.

    Args:
        kernels: Each compiles one.
    """
    import triton  # which a machine without a GPU need not have

    mode = getattr(triton, "AsyncCompileMode", None)  # older ones have none
    if len(kernels) < 2 or mode is None or interpreted() or not _PARSES_IN_THREADS:
        return

    def compile_all() -> None:
        with ThreadPoolExecutor(len(kernels)) as pool, mode(pool):
            for kernel in kernels:
                kernel()

    # In a context of its own: when one does not compile, Triton 3.6 does not leave the mode.
    contextvars.copy_context().run(compile_all)
