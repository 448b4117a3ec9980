"""The forward and backward passes of a run's steps: what they carry on, and what they keep."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from pararnn.lm.data.words import say
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.carried import CarriedState
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.random_state import random_state, set_random_state
from pararnn.lm.training.replay import Replay, replays
from pararnn.lm.training.sharding import may_recompute, recompute, recomputes
from pararnn.lm.training.step import add_gradients, separated


class Passes:
    """Computes the gradients of a step.

    With activation checkpointing "auto" activations are kept until memory runs out for the first
    time. The step is then taken again, from the same state and random numbers. On one GPU compiled
    passes that keep their activations are a CUDA graph.

    Args:
        config: Settings.
        model: As `lay_out` left it.
        processes: That train together.
        carried: State that goes on from sequence to sequence; None where every one begins anew.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: CausalLoss,
        processes: Processes,
        carried: CarriedState | None = None,
    ) -> None:
        self.config, self.model, self.processes = config, model, processes
        self.carried = carried
        self.recomputes = recomputes(config.execution, processes)
        self._replay: Replay | None = None
        if replays(config.execution, processes, self.recomputes):
            self._replay = Replay(model, [] if carried is None else carried.tensors())

    def __call__(self, batches: list[Tensor]) -> Tensor:
        """Add the gradients of batches; returns mean cross-entropy and z-loss, shape (2,)."""
        if self.recomputes or not may_recompute(self.config.execution):
            return self._run(batches)
        device = self.processes.device
        before = random_state(device)
        try:
            return self._run(batches)
        except torch.OutOfMemoryError:
            pass  # what follows does not belong in here: the error holds the activations
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(
            "Memory ran out, so activation checkpointing is on from now: blocks keep only their "
            "inputs and compute the rest again. --text.batch-size with fewer sequences may be "
            "faster."
        )
        self.recompute()
        set_random_state(device, before)
        return self._run(batches)

    def settle_by(self, settle: Callable[[], None]) -> None:
        """Call `settle` before a graph is made; see `Replay`."""
        if self._replay is not None:
            self._replay.settle = settle

    def recompute(self) -> None:
        """Compute activations again from now on."""
        if not self.recomputes:
            self.recomputes = True
            self._replay = None  # with the memory of its graphs
            recompute(self.model, self.config.execution)

    def _run(self, batches: list[Tensor]) -> Tensor:
        apart = separated(self.model, batches)
        if self._replay is not None:  # two graphs, and not one for each order of such batches
            apart = (any(apart),) * len(batches)

        def run(given: list[Tensor]) -> Tensor:
            caches = None if self.carried is None else self.carried.caches(len(given))
            settings, here = self.config.optimizer, self.processes
            losses = add_gradients(self.model, given, settings, here, caches, apart)
            if self.carried is not None and caches is not None:
                self.carried.go_on(caches)
            return losses

        return run(batches) if self._replay is None else self._replay(run, batches, apart)
