"""How steps of generation run: compiled, or operation by operation."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from pararnn._words import counted
from pararnn.planning.costs import COSTS, Costs


@dataclass(frozen=True)
class StepChoice:
    """How a `Decoder` had better run its step; to be printed.

    Attributes:
        compiled: Whether to compile it, the argument of `Decoder`.
        because: The reason, in words.
    """

    compiled: bool
    because: str

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'not compiled'}: {self.because}"


def choose_step(device: str, blocks: int, steps: int, costs: Costs = COSTS) -> StepChoice:
    """Whether to compile the step of a `Decoder`: on a GPU, where what it saves is more.

    Args:
        device: Type of the device.
        blocks: Of the model.
        steps: Tokens to generate, of each text.
        costs: What compiling takes and saves.
    """
    if device != "cuda":
        return StepChoice(False, f"a step is compiled on a GPU only, and this is {device}")
    if importlib.util.find_spec("triton") is None:
        return StepChoice(False, "compiling needs Triton, which is not installed")
    takes = blocks * costs.decoding_compile_s
    saves = steps * blocks * costs.decoding_saved_us * 1e-6
    than = "more" if saves > takes else "no more"
    return StepChoice(
        saves > takes,
        f"over {counted(steps, 'token')} that saves {saves:.3g} s, {than} than the "
        f"{takes:.3g} s that compiling {counted(blocks, 'block')} takes",
    )
