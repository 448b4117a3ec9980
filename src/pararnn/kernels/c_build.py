"""Compiles generated C with the system's compiler and keeps the result on disk by content."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

_FLAGS: tuple[str, ...] = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fopenmp-simd")
# Neither changes a result: errno and floating-point traps are not looked at.
_FLAGS += ("-fno-math-errno", "-fno-trapping-math")


class CompilerError(RuntimeError):
    """The C compiler failed on generated source; carries what it printed."""


@functools.lru_cache(maxsize=1)
def find_compiler() -> str | None:
    """The C compiler: $CC, else the first of cc, gcc, clang on the path; None without one."""
    candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return candidate
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $PARARNN_CACHE, else the user's cache folder."""
    if "PARARNN_CACHE" in os.environ:
        return Path(os.environ["PARARNN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pararnn"


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = [x for x in lines if x.startswith(("flags", "Features", "model name"))]
        return "\n".join(features[:2])
    except OSError:
        return platform.processor()


def load(source: str) -> ctypes.CDLL:
    """Compile C source unless an equal one was compiled before on such a machine, and load it.

    Raises:
        CompilerError: No compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError(
            "backend='c' needs a C compiler and none was found (looked for $CC, cc, gcc, clang). "
            "Install one, or use backend='torch', or backend='auto' to choose."
        )
    binary = shutil.which(shlex.split(compiler)[0]) or compiler
    stamp = Path(binary).resolve().stat().st_mtime_ns
    identity = (source, compiler, binary, str(stamp), _processor(), *_FLAGS)
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    for folder in (cache_folder(), Path(tempfile.gettempdir()) / f"pararnn-{os.getuid()}"):
        library = folder / f"{digest}.so"
        if library.exists():
            return ctypes.CDLL(str(library))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, source, library)
        except OSError:
            continue
        return ctypes.CDLL(str(library))
    raise CompilerError(f"cannot write compiled kernels to {cache_folder()}; set PARARNN_CACHE.")


def _compile(compiler: str, source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        file, output = Path(folder, "kernel.c"), Path(folder, "kernel.so")
        file.write_text(source)
        for tuning in (["-march=native"], ["-mcpu=native"], []):
            command = [
                *shlex.split(compiler),
                *_FLAGS,
                *tuning,
                str(file),
                "-o",
                str(output),
                "-lm",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise CompilerError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
        os.replace(file, library.with_suffix(".c"))
        os.replace(output, library)
