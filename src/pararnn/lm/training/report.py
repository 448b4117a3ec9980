"""The report of a run after its last step: printed and stored."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from pararnn import RNN
from pararnn._words import counted
from pararnn.lm.data.files import write_atomically
from pararnn.lm.data.words import say
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.comparison import compare_train_steps
from pararnn.lm.training.config import TrainConfig, leaves, to_dict
from pararnn.lm.training.data import Windows
from pararnn.lm.training.evaluation import Evaluation, evaluate
from pararnn.lm.training.language_model import generate_text
from pararnn.lm.training.metrics import MetricsFile, plot_loss, show_result
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.step import train_step
from pararnn.lm.training.text import Text
from pararnn.lm.training.validation import say_best

SAMPLE_PROMPT = "def "  # for Python's standard library; other texts begin anew
SAMPLE_TOKENS = 300
LARGEST_LOOP = 2**24
"""Values of the state, over all layers and times, up to which the step-by-step model is run."""


def report(
    config: TrainConfig,
    run: RunFolder,
    text: Text,
    model: PreTrainedModel,
    step: int,
    train_seconds: float,
    *,
    alone: bool,
) -> Evaluation:
    """Validation, comparison with the step-by-step model, plot and sample.

    Args:
        config: Resolved settings.
        run: Where results go.
        text: Its held-out part is predicted.
        model: Trained, whole, in this process.
        step: Optimiser steps done.
        train_seconds: That they took.
        alone: Compare the speed of this one process, if the model is small.
    """
    validation = evaluate(
        model,
        text.validation,
        text.codec,
        limit=config.text.validation_tokens,
        chunk=config.text.sequence_length,
    )
    say(
        f"Validation: {validation.bits_per_byte:.3f} bits per byte "
        f"({validation.loss:.4f} nats) on {validation.num_tokens:,} held-out {text.codec.unit}, "
        f"after {counted(step, 'step')} in {train_seconds:.0f} s"
    )
    history = MetricsFile(run.validation, last_step=step - 1)
    history.write(validation.record(step, train_seconds))
    history.close()
    if alone and _loop_is_small(config, model):
        say(_compare(config, text, model))
    say_best(run, step)
    if plot_loss(run):
        say(f"Plot: {run.plot}")
    prompt = SAMPLE_PROMPT if config.data is None else ""
    sample = generate_text(model, text.codec, prompt, num_tokens=SAMPLE_TOKENS, seed=config.seed)
    write_atomically(run.sample, sample.encode())
    values = {"loss": validation.loss, "bits_per_byte": validation.bits_per_byte}
    show_result(run.tensorboard, step, values, leaves(to_dict(config)), sample)
    say(f"Sample:\n{sample}")
    return validation


def _loop_is_small(config: TrainConfig, model: PreTrainedModel) -> bool:
    layers = [module for module in model.modules() if isinstance(module, RNN)]
    times = config.text.batch_size * config.text.sequence_length
    return 0 < sum(layer.hidden_size for layer in layers) * times <= LARGEST_LOOP


def _compare(config: TrainConfig, text: Text, model: PreTrainedModel) -> str:
    settings = config.optimizer
    windows = Windows(text.train, config.text.sequence_length)
    chosen = [i % len(windows) for i in range(config.text.batch_size)]
    batch = torch.stack([windows[i] for i in chosen])
    here = Processes(0, 1, model.device)

    def prepare(loss: CausalLoss) -> Callable[[], object]:
        optimizer = build_optimizer(loss, settings)
        return lambda: train_step(loss.train(), optimizer, [batch], settings, here).read()

    times = compare_train_steps(CausalLoss(model, settings.z_loss_weight), prepare)
    size, length = batch.shape[0], batch.shape[1] - 1
    return (
        f"Train step ({size} x {length} {text.codec.unit}): {times.parallel_s * 1e3:.0f} ms; the "
        f"same model run step by step: {times.sequential_s * 1e3:.0f} ms, {times.ratio:.1f} times "
        "as long"
    )
