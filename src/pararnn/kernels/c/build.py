"""Compiles generated C with the system's compiler and keeps the result on disk by content."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pararnn.kernels import cache

# The last two change no result: errno and floating-point traps are not looked at.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
_LIMIT_S = 120.0  # a kernel takes a second


class CompilerError(RuntimeError):
    """The C compiler failed on generated source; carries what it printed."""


class CompilerHangs(CompilerError):
    """The C compiler did not end."""


def find_compiler() -> str | None:
    """The C compiler: $CC, else the first of cc, gcc, clang on the path; None without one."""
    for candidate in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        try:
            command = shlex.split(candidate)
        except ValueError:  # quotes without an end
            continue
        if command and shutil.which(command[0]):
            return candidate
    return None


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = [x for x in lines if x.startswith(("flags", "Features", "model name"))]
        return "\n".join(features[:2])
    except OSError:
        return platform.processor()


def load(source: str, functions: Sequence[str]) -> ctypes.CDLL:
    """Compile C source unless an equal one was compiled before on such a machine, and load it.

    The kernels run on PyTorch's OpenMP threads where the compiler's OpenMP finds its functions in
    this process; a second pool of threads would compete with those, which spin between operations.
    Elsewhere they start POSIX threads of their own.

    Args:
        source: The text.
        functions: Names of what the library is to have.

    Raises:
        CompilerError: No compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError("no C compiler was found (looked for $CC, cc, gcc, clang).")
    found = hasattr(ctypes.CDLL(None), "GOMP_parallel")
    made = []
    for openmp in ["-fopenmp", "-fopenmp-simd"] if found else ["-fopenmp-simd"]:
        try:
            made.append(_built(compiler, source, openmp))
            return _opened(compiler, made[-1], functions)
        except CompilerHangs:
            raise
        except CompilerError as error:  # with another OpenMP, whose functions are not there
            failure = error
    for file in made:
        cache.discard(file)
    raise failure


def _opened(compiler: str, file: Path, functions: Sequence[str]) -> ctypes.CDLL:
    wrong = f"what the C compiler {compiler!r} wrote cannot be loaded"
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise CompilerError(f"{wrong}: {error}") from error
    for name in functions:
        if not hasattr(library, name):
            raise CompilerError(f"{wrong}: it has no function {name}")
    return library


def _built(compiler: str, source: str, openmp: str) -> Path:
    """The library made from the source, from the cache or new."""
    binary = shutil.which(shlex.split(compiler)[0]) or compiler
    stamp = Path(binary).resolve().stat().st_mtime_ns
    identity = (source, compiler, binary, str(stamp), _processor(), *_FLAGS, openmp)
    digest = hashlib.sha256(os.fsencode("\0".join(identity))).hexdigest()[:24]
    failure: OSError | None = None
    for folder in cache.folders():
        library = folder / f"{digest}.so"
        if cache.is_kept(library):
            return library
        try:
            content = _compiled(compiler, source, openmp, folder)
            cache.write(library.with_suffix(".c"), source.encode())  # for who wants to read it
            cache.keep(library, content)
        except OSError as error:
            failure = error
            continue
        return library
    raise CompilerError(
        f"there is no folder to write compiled kernels to ({failure}); set PARARNN_CACHE."
    ) from failure


def _compiled(compiler: str, source: str, openmp: str, place: Path) -> bytes:
    """A new library, made in a folder of its own in `place`."""
    command = shlex.split(compiler)
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as folder:
        file, compiled, linked = (str(Path(folder, f"kernel.{end}")) for end in ("c", "o", "so"))
        Path(file).write_bytes(source.encode())
        for tuning in (["-march=native"], ["-mcpu=native"], []):
            build = [*command, *_FLAGS, openmp, *tuning, "-c", file, "-o", compiled]
            failure = _run(build, compiled)
            if failure is None:
                break
        else:
            raise CompilerError(failure)
        # Not linked with an OpenMP library: its functions are PyTorch's.
        failure = _run([*command, "-shared", "-pthread", compiled, "-o", linked, "-lm"], linked)
        if failure:
            raise CompilerError(failure)
        return Path(linked).read_bytes()


def _run(command: Sequence[str], result: str) -> str | None:
    """Run a compiler; what it said if it failed or wrote no result.

    Raises:
        CompilerError: It did not start.
        CompilerHangs: It did not end.
    """
    folder = Path(result).parent
    shown = shlex.join(command).replace(f"{folder}/", "")
    # what it says goes to a file: processes that it leaves running would hold a pipe open
    with tempfile.TemporaryFile(dir=folder) as said:
        try:
            running = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise CompilerError(f"{command[0]} could not be started: {error}") from error
        try:
            status = running.wait(_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise CompilerHangs(f"{shown} did not end within {_LIMIT_S:.0f} s") from error
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 4000))
        words = said.read().decode(errors="replace")
    if status:
        failure = f"ended with status {status}"
    elif not os.path.exists(result) or not os.path.getsize(result):
        failure = "wrote nothing"
    else:
        return None
    return f"{shown} {failure}\n{words}".replace(f"{folder}/", "").strip()
