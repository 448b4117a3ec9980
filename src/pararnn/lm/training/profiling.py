"""A trace of some steps with `torch.profiler`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from pararnn.lm.training.parallel import Processes


@contextmanager
def record_steps(
    folder: Path, num_steps: int, processes: Processes
) -> Iterator[Callable[[], None]]:
    """Record steps after two others, and write one trace per process for `chrome://tracing`.

    Args:
        folder: Gets `process-RANK.json`; what is there is replaced.
        num_steps: Steps to record; 0 for none.
        processes: Each records itself.

    Yields:
        To be called after every step.
    """
    if num_steps == 0:
        yield lambda: None
        return
    folder.mkdir(exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if processes.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path = str(folder / f"process-{processes.rank}.json")
    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=lambda recorded: recorded.export_chrome_trace(path),
    ) as profiler:
        yield profiler.step
