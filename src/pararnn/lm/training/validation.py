"""Validation during training: held-out text, and which step predicts it best."""

from contextlib import nullcontext

import torch

from pararnn.lm.data.words import say
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.averaging import AverageWeights
from pararnn.lm.training.checkpoints import checkpoint_path
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.evaluation import Evaluation, evaluate_together
from pararnn.lm.training.metrics import read_metrics
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.text import Text


class Validator:
    """Evaluates a model while it is trained. All processes must call its methods.

    Args:
        config: Resolved settings.
        run: Where measurements and checkpoints are.
        text: Its held-out part is predicted.
        model: As `lay_out` left it.
        processes: That hold it together.
        average: Weights to evaluate in the place of the last ones.

    Attributes:
        best: The step with the least loss of those whose checkpoint is kept; None before the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        text: Text,
        model: CausalLoss,
        processes: Processes,
        average: AverageWeights | None = None,
    ) -> None:
        self.config, self.run, self.text, self.model = config, run, text, model
        self.processes, self.average = processes, average
        self.best: int | None = None
        self._least = float("inf")

    def begin(self, step: int) -> None:
        """Go on after a step: the best so far is read from the run."""
        found = self.processes.on_first(lambda: best_of(self.run, step))
        if found is not None:
            self.best, self._least = found

    def is_due(self, step: int) -> bool:
        """Whether to validate after this step; after the last one the report does."""
        every = self.config.validate_every
        return every > 0 and step % every == 0 and step < self.config.steps

    def __call__(self, step: int) -> tuple[Evaluation, bool]:
        """The loss after a step, and whether it is the least so far."""
        settings, device = self.config, self.processes.device
        half = settings.optimizer.precision == "bfloat16"
        mean = nullcontext() if self.average is None else self.average.in_place()
        with (
            mean,
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            result = evaluate_together(
                self.model,
                self.text.validation,
                self.text.codec,
                self.processes,
                limit=settings.text.validation_tokens,
                chunk=settings.text.sequence_length,
            )
        improved = result.loss < self._least
        if improved:
            self.best, self._least = step, result.loss
        return result, improved


def best_of(run: RunFolder, last_step: int) -> tuple[int, float] | None:
    """Step and loss of the best validation up to a step whose checkpoint is kept."""
    known = [
        (float(record["loss"]), record["step"])
        for record in read_metrics(run.validation)
        if record["step"] <= last_step and checkpoint_path(run.checkpoints, record["step"]).is_dir()
    ]
    if not known:
        return None
    loss, step = min(known)
    return step, loss


def say_best(run: RunFolder, step: int) -> None:
    """Name the checkpoint of the best validation, where it is not that of the last step."""
    found = best_of(run, step)
    if found is not None and found[0] != step:
        kept = checkpoint_path(run.checkpoints, found[0])
        say(f"Best validation: {found[1]:.4f} nats at step {found[0]}, kept in {kept}")
