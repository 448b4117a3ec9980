"""How steps of generation run: compiled, or operation by operation."""

from __future__ import annotations

import importlib.util

from pararnn.planning.costs import COSTS, Costs
from pararnn.planning.plan import Choice

PLAIN, COMPILED = "plain", "compiled"


def choose_step(device: str, blocks: int, steps: int, costs: Costs = COSTS) -> Choice:
    """Whether to compile the step of a `Decoder`: on a GPU, where what it saves is more.

    Args:
        device: Type of the device.
        blocks: Of the model.
        steps: Tokens to generate, of each text.
        costs: What compiling takes and saves.

    Returns:
        "compiled" or "plain", with the reason; to be printed.
    """
    if device != "cuda":
        return Choice("step", PLAIN, f"a step is compiled on a GPU only, and this is {device}")
    if importlib.util.find_spec("triton") is None:
        return Choice("step", PLAIN, "compiling needs Triton, which is not installed")
    takes = blocks * costs.decoding_compile_s
    saves = steps * blocks * costs.decoding_saved_us * 1e-6
    value, than = (COMPILED, ">") if saves > takes else (PLAIN, "<=")
    return Choice(
        "step",
        value,
        f"over {steps:,} tokens a compiled step saves {saves:.3g} s {than} the {takes:.3g} s that "
        f"compiling {blocks} blocks takes",
    )
