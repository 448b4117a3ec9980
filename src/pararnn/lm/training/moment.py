"""Points in the work of a device, which may still lie ahead of Python."""

import time

import torch


class Moment:
    """When a device has done all that was asked of it until now.

    Args:
        device: Only a GPU works while Python goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._seconds = time.perf_counter()

    def wait(self) -> None:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, before: "Moment") -> float:
        """Seconds between two moments that were waited for."""
        if self._event is not None and before._event is not None:
            return before._event.elapsed_time(self._event) / 1e3
        return self._seconds - before._seconds
