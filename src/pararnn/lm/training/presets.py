"""Training settings of the paper's models, and of others of their size."""

from pararnn.lm.presets import SEQUENCE_LENGTH, preset
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
)


def preset_config(model: str, size: str) -> TrainConfig:
    """Settings to train a model of the paper with: Danieli et al. 2025, C.1 and Table 4.

    Blocks are compiled. Another stack of mixers has the settings of ParaGRU.

    Args:
        model: "paragru", "paralstm", "transformer", "mamba2", or a stack such as "m2rnn+delta".
        size: "400m", "1b", "2.9b" or "7b".

    Raises:
        ValueError: There is no such preset.
    """
    chosen = preset(model, size)
    return TrainConfig(
        model=model,
        steps=chosen.steps,
        checkpoint_every=1000,
        validate_every=1000,
        architecture=ArchitectureConfig(
            width=chosen.width,
            num_layers=chosen.num_layers,
            num_heads=chosen.num_heads,
            state_size=chosen.state_size,
            initializer_std=0.02,
            max_timescale=None,
        ),
        text=TextConfig(
            sequence_length=SEQUENCE_LENGTH,
            batch_size=chosen.batch_size,
            global_batch_size=chosen.global_batch_size,
        ),
        optimizer=OptimizerConfig(
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            z_loss_weight=chosen.z_loss_weight,
            precision="bfloat16",
        ),
        schedule=ScheduleConfig(length=chosen.steps),
        execution=ExecutionConfig(compile=True),
    )
