"""Time whole train steps of our language models and of the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pararnn._words import counted
from pararnn.bench.problem import Row
from pararnn.bench.timing import steps_milliseconds
from pararnn.lm.bench.models import ModelSize, release
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.flops import peak_flops, train_flops_per_token
from pararnn.lm.models.presets import preset
from pararnn.lm.training.config import ExecutionConfig
from pararnn.lm.training.initial import outline
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.replay import Replay, replays
from pararnn.lm.training.sharding import lay_out, recomputes

KERNELS = frozenset({"sweep", "correct", "refine", "total"})  # as the generated Triton has them


def train_rows(
    size: ModelSize,
    architectures: Sequence[str],
    batch: int | None,
    time: int,
    processes: Processes,
) -> Iterator[Row]:
    """Time train steps on random tokens; one row for each architecture.

    A step is forward and backward in bfloat16 autocast with float32 weights, and fused AdamW; on a
    GPU every block is compiled. If an architecture does not fit into memory, it is tried with half
    the sequences, then with activation checkpointing. Blocks that do not compile run without. The
    row says so, or says why the architecture was skipped.

    Args:
        size: Size of the models.
        architectures: Names of presets.
        batch: Sequences of one process; None for as many as the paper has per GPU at this size.
        time: Tokens per sequence.
        processes: Processes that share the model (FSDP2), each with its own sequences. An error in
            one of them counts for all.
    """
    batch = batch or preset(architectures[0], size.name).batch_size
    for architecture in architectures:
        yield _row(size, architecture, batch, time, processes)


def _row(size: ModelSize, architecture: str, batch: int, time: int, processes: Processes) -> Row:
    notes = [note for note in [missing_kernels(architecture, size.memory_options)] if note]
    row: Row = {"architecture": architecture, "batch": batch, "time": time}
    compiled = processes.device.type == "cuda"
    tries = [(batch, False), (max(1, batch // 2), False), (batch, True)]
    while tries:
        sequences, checkpointing = tries[0]
        release()
        execution = ExecutionConfig(
            activation_checkpointing="on" if checkpointing else "off", compile=compiled
        )
        try:
            measured = measure(size, architecture, sequences, time, processes, execution)
        except torch.OutOfMemoryError:
            tries.pop(0)
            continue
        except Exception as error:  # any error; the other architectures must still run
            reason = _in_one_line(error)
            if not compiled:
                return row | {"note": "; ".join(notes), "skipped": reason}
            notes.append(f"blocks as they are, since they do not compile ({reason})")
            compiled = False
            continue
        if sequences != batch:
            notes.append(f"{counted(sequences, 'sequence')}, since {batch} do not fit the memory")
        measured |= {"batch": sequences, "checkpointing": checkpointing, "note": "; ".join(notes)}
        return row | measured
    reason = "out of memory, with activation checkpointing too"
    return row | {"note": "; ".join(notes), "skipped": reason}


def _in_one_line(error: Exception) -> str:
    reason = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def measure(
    size: ModelSize,
    architecture: str,
    batch: int,
    time: int,
    processes: Processes,
    execution: ExecutionConfig,
) -> Row:
    """The figures of one architecture.

    Raises:
        torch.OutOfMemoryError: It does not fit into memory.
    """
    device = processes.device
    alone = processes.count == 1  # then it is faster to make it on the device
    model = (
        size.build(architecture, device, torch.float32, time)
        if alone
        else outline(size.config(architecture, time))
    )
    z_loss_weight = preset(architecture, size.name).z_loss_weight
    return measure_model(CausalLoss(model, z_loss_weight), batch, time, processes, execution)


def measure_model(
    loss: CausalLoss, batch: int, time: int, processes: Processes, execution: ExecutionConfig
) -> Row:
    """The figures of a new model, which is laid out here.

    Raises:
        torch.OutOfMemoryError: It does not fit into memory.
    """
    model, device = loss.model, processes.device
    on_gpu = device.type == "cuda"
    lay_out(loss, execution, processes)
    again = recomputes(execution, processes)
    replay = Replay(loss) if replays(execution, processes, again) else None
    step = _train_step(loss, batch, time, device, replay)
    milliseconds = steps_milliseconds(step, device)
    tokens = processes.count * batch * time
    flops = train_flops_per_token(model, time) * tokens
    peak = peak_flops(device)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return {
        "processes": processes.count,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": milliseconds,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "mfu": None if peak is None else flops / (milliseconds / 1e3) / peak / processes.count,
        "peak_memory_gib": memory,
        **(_traced(step) if on_gpu else kernel_times([])),
    }


def _train_step(
    loss: CausalLoss, batch: int, time: int, device: torch.device, replay: Replay | None
) -> Callable[[], None]:
    loss.train()
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-4, fused=True)
    batches = [torch.randint(loss.model.config.vocab_size, (batch, time + 1), device=device)]

    def run(given: list[Tensor]) -> Tensor:
        (tokens,) = given
        with torch.autocast(device.type, torch.bfloat16):
            value: Tensor = loss(tokens[:, :-1], tokens[:, 1:])[0]
        value.backward()
        return value.detach()

    def step() -> None:
        run(batches) if replay is None else replay(run, batches)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _traced(step: Callable[[], None]) -> Row:
    """How long the kernels of a step run, and the share of ours; None where no kernel is seen."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() or [] if e.device_type == DeviceType.CUDA]
    return kernel_times([(e.time_range.start, e.time_range.end, e.name) for e in kernels])


def kernel_times(spans: Sequence[tuple[float, float, str]]) -> Row:
    """Figures of a trace: when kernels begin and end, in microseconds, and their names."""
    everything = covered([(begin, end) for begin, end, _ in spans])
    ours = covered([(begin, end) for begin, end, name in spans if name in KERNELS])
    if not everything:
        return {"kernels_ms": None, "recurrence_share": None}
    return {"kernels_ms": everything / 1e3, "recurrence_share": ours / everything}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, which overlap where a kernel waits for the one before."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
