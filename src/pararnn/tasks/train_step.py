"""One training step of a small model, as one CUDA graph on a GPU.

These models are so small that a GPU waits for Python: a graph launches the hundreds of kernels of a
step, gradients and update among them, in one call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn.kernels.graphs import Captured, captured
from pararnn.lm.data.words import say
from pararnn.tasks.task import Batch

_IGNORED = -100


class TrainStep:
    """Loss, gradients, update and bounds.

    Attributes:
        graph: What a GPU replays; None on a CPU, before the first call, and for models that wait
            for the GPU within a step.

    Args:
        model: Tokens (batch, time) to logits (batch, time, classes).
        learning_rate: Before the first call.
        weight_decay: Times the learning rate, per step, on all parameters.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, weight_decay: float, max_grad_norm: float
    ) -> None:
        self.model, self.max_grad_norm = model, max_grad_norm
        device = next(model.parameters()).device
        self._on_gpu = device.type == "cuda"
        # on a GPU the rate is a tensor, since a graph reads it anew in every replay
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=torch.tensor(learning_rate, device=device) if self._on_gpu else learning_rate,
            betas=(0.9, 0.999),
            weight_decay=weight_decay,
            fused=True,
            capturable=self._on_gpu,
        )
        self.graph: Captured | None = None
        self._batch: Batch | None = None

    def __call__(self, batch: Batch, learning_rate: float) -> Tensor:
        """Take a step; the loss before it, on the device. The next call may overwrite it.

        Raises:
            torch.OutOfMemoryError: On a GPU; the parameters are as before if it was the first step.
        """
        if not self.model.training:
            self.model.train()
        if self._on_gpu and self._batch is None:
            self._capture(batch)
        self._set_rate(learning_rate)
        if self.graph is None or self._batch is None:
            return self._step(batch)
        for held, part in zip(self._batch, batch, strict=True):
            held.copy_(part)
        self.graph()
        loss: Tensor = self.graph.kept
        return loss

    def _set_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(batch.tokens)
        targets = batch.targets.where(batch.counts, _IGNORED)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return loss.detach()

    def _capture(self, batch: Batch) -> None:
        """Make the graph. All steps go through it, so a run that was stopped goes on to the bit.

        The steps before the capture have a rate of 0, which leaves the parameters; then the
        optimizer's state is set back.
        """
        torch.cuda.synchronize()  # kernels that are timed first, as Mamba2's, are alone then
        held = self._batch = Batch._make(part.clone() for part in batch)
        state = self.optimizer.state
        before = {p: {k: v.clone() for k, v in state[p].items()} for p in list(state)}
        self._set_rate(0.0)
        try:
            self.graph = captured(lambda: self._step(held))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a model that waits for the GPU within a step
            say(f"Note: steps are not captured in a CUDA graph, and slower: {error}")
            self.optimizer.zero_grad(set_to_none=True)
        for parameter, values in state.items():
            for name, value in values.items():
                if parameter in before:
                    value.copy_(before[parameter][name])
                else:
                    value.zero_()
