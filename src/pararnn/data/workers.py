"""Processes that end with the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from pararnn.training.signals import SIGNALS


class Inline(Executor):
    """Does the work in this process, when it is submitted."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Call the function; what it raises is raised here."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def start_worker() -> None:
    """Leave stop signals to the parent, and end when it does, even when it is killed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
