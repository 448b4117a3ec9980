"""Programs of a kernel that run at the same time in Triton's interpreter, each in a thread.

The interpreter runs one program after the other, so programs that wait for each other never end.
"""

import contextlib
import itertools
import threading
from unittest import mock

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

from pararnn.kernels.triton import spread, sweeps, wide

_TIMEOUT_S = 60


@contextlib.contextmanager
def programs_at_once(multiprocessors):
    """Within this, `wide.run` and `spread.run` are launched as on so many multiprocessors."""
    own, barriers, errors = threading.local(), {}, []
    launch, lock = sweeps._launch, threading.Lock()
    rewritten = interpreter.InterpretedFunction.rewrite

    def program_id(axis):
        value = getattr(own, "place", (0, 0, 0))[axis]
        return interpreter.TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    def rewrite(function):  # Python may raise SystemError where threads parse at the same time
        with lock:
            return rewritten(function)

    def together(counter, _target, parts):
        with lock:
            place = int(counter.handle.data[0])
            barrier = barriers.setdefault(place, threading.Barrier(int(parts)))
        barrier.wait(_TIMEOUT_S)

    def run(kernel, place, arguments):
        own.place = place
        with np.errstate(all="ignore"):
            try:
                launch(kernel, (1,), arguments)
            except BaseException as error:
                errors.append(error)
                for barrier in barriers.values():
                    barrier.abort()

    def launch_all(kernel, grid, arguments):
        barriers.clear()
        places = itertools.product(*(range(n) for n in grid))
        threads = [threading.Thread(target=run, args=(kernel, p, arguments)) for p in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    # once for all, since threads would undo it for each other
    patched = [interpreter._patch_lang(f.fn) for f in (wide.run, spread.run, tl.sum)]
    builder = interpreter.interpreter_builder
    try:
        with (
            mock.patch.object(interpreter, "_patch_lang", return_value=mock.Mock()),
            mock.patch.object(builder, "create_get_program_id", program_id),
            mock.patch.object(interpreter.InterpretedFunction, "rewrite", rewrite),
            mock.patch.object(wide, "together", together),
            mock.patch.object(spread, "arrive", return_value=None),
            mock.patch.object(spread, "wait", together),
            mock.patch.object(sweeps, "_launch", launch_all),
            mock.patch.object(sweeps, "processors", return_value=multiprocessors),
        ):
            yield
    finally:
        for scope in reversed(patched):
            scope.restore()
