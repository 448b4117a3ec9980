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

# The last two change no result: errno and floating-point traps are not looked at.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")


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
    """Where generated kernels are kept: $PARARNN_CACHE, else the user's cache folder."""
    if "PARARNN_CACHE" in os.environ:
        return Path(os.environ["PARARNN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pararnn"


def cache_folders() -> list[Path]:
    """Where to try to keep them: the cache folder, then one that can nearly always be written."""
    return [cache_folder(), Path(tempfile.gettempdir()) / f"pararnn-{os.getuid()}"]


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

    The kernels run on PyTorch's OpenMP threads where the compiler's OpenMP finds its functions in
    this process; a second pool of threads would compete with those, which spin between operations.
    Elsewhere they start POSIX threads of their own.

    Raises:
        CompilerError: No compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError(
            "backend='c' needs a C compiler and none was found (looked for $CC, cc, gcc, clang). "
            "Install one, or use backend='torch', or backend='auto' to choose."
        )
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        try:
            return ctypes.CDLL(str(_built(compiler, source, "-fopenmp")))
        except (CompilerError, OSError):
            pass  # another compiler's OpenMP, whose functions are not in this process
    return ctypes.CDLL(str(_built(compiler, source, "-fopenmp-simd")))


def _built(compiler: str, source: str, openmp: str) -> Path:
    """The library made from the source, from the cache or new."""
    binary = shutil.which(shlex.split(compiler)[0]) or compiler
    stamp = Path(binary).resolve().stat().st_mtime_ns
    identity = (source, compiler, binary, str(stamp), _processor(), *_FLAGS, openmp)
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    for folder in cache_folders():
        library = folder / f"{digest}.so"
        if library.exists():
            return library
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, source, openmp, library)
        except OSError:
            continue
        return library
    raise CompilerError(f"cannot write compiled kernels to {cache_folder()}; set PARARNN_CACHE.")


def _compile(compiler: str, source: str, openmp: str, library: Path) -> None:
    command = shlex.split(compiler)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        file, compiled, linked = (str(Path(folder, f"kernel.{end}")) for end in ("c", "o", "so"))
        Path(file).write_text(source, encoding="utf-8")
        for tuning in (["-march=native"], ["-mcpu=native"], []):
            build = [*command, *_FLAGS, openmp, *tuning, "-c", file, "-o", compiled]
            done = subprocess.run(build, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise CompilerError(f"{shlex.join(build)} failed:\n{done.stderr[-4000:]}")
        # Not linked with an OpenMP library: its functions are PyTorch's.
        link = [*command, "-shared", "-pthread", compiled, "-o", linked, "-lm"]
        done = subprocess.run(link, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilerError(f"{shlex.join(link)} failed:\n{done.stderr[-4000:]}")
        os.replace(file, library.with_suffix(".c"))
        os.replace(linked, library)
