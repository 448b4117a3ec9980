"""Writes generated Triton to the cache folder and imports it from there."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from pararnn.kernels.c_build import cache_folders


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def load(source: str) -> ModuleType:
    """Import generated source; Triton reads the text of its functions from the file.

    Raises:
        OSError: No folder to write to; the message names them.
    """
    name = f"pararnn_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    file = _written(source, f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def compile_together(launches: Sequence[Callable[..., None]]) -> None:
    """Compile kernels at the same time; most of it happens without holding Python's lock.

    Args:
        launches: Each compiles what it would run when called with `warmup=True`.
    """
    import triton  # which a machine without a GPU need not have

    mode = getattr(triton, "AsyncCompileMode", None)  # older ones have none
    if len(launches) < 2 or mode is None or interpreted():
        return
    with ThreadPoolExecutor(len(launches)) as pool, mode(pool):
        for launch in launches:
            launch(warmup=True)


def _written(source: str, name: str) -> Path:
    """The file with this text, from the cache or new."""
    folders = cache_folders()
    for folder in folders:
        file = folder / name
        try:
            if file.exists() and file.read_text(encoding="utf-8") == source:
                return file
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, suffix=".py", encoding="utf-8", delete=False
            ) as new:
                new.write(source)
            os.replace(new.name, file)
        except OSError:
            continue
        return file
    raise OSError(
        f"cannot write generated kernels to {' or '.join(map(str, folders))}; set PARARNN_CACHE."
    )
