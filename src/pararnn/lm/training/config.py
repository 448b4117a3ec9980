"""Settings of a training run: nested dataclasses, checked when made, stored as `config.json`."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pararnn._whole import check_whole_fields
from pararnn.lm.catalogue import (
    ATTENTION,
    BASELINES,
    OwnName,
    check_architecture,
    check_used,
    parts,
    read_options,
    repeated,
)
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import read_json
from pararnn.planning.backends import check_name

try:
    from tyro.conf import arg
except ModuleNotFoundError:  # only command lines need it

    def arg(**_: Any) -> Any:  # type: ignore[no-redef] # its stand-in
        """Nothing."""


DEFAULT_STEPS = 500


@dataclass(kw_only=True)
class ArchitectureConfig:
    """Shape of the language model."""

    width: Annotated[int, arg(aliases=["--width"])] = 192
    """Channels of the residual stream; a cell's recurrence has as many."""
    num_layers: Annotated[int, arg(aliases=["--layers", "--num-layers"])] = 3
    """Blocks."""
    num_heads: Annotated[int, arg(aliases=["--heads"])] = 4
    """Heads of attention, of Mamba2, or of a cell's input projection; must divide the width."""
    state_size: int = 128
    """Entries that Mamba2 remembers per channel."""
    conv_kernel: int = 4
    """Steps that the causal convolution sees; the transformer has none."""
    attention_every: int = 0
    """Every N-th block has attention in the place of the cell; 0 for none."""
    initializer_std: float = 0.07
    """Standard deviation of linear and embedding weights at the start."""
    dropout: float = 0.0
    """Share of the channels that are left out behind every mixer and MLP while training; for small
    data."""
    max_timescale: float | None = 1024.0
    """Longest time, in steps, over which channels of a cell forget at the start, where a gate
    decides it; None for biases of zero, as in the paper."""

    def __post_init__(self) -> None:
        check_whole_fields(self, "architecture.")
        for name in ("width", "num_layers", "num_heads", "state_size", "conv_kernel"):
            _require(getattr(self, name) >= 1, f"architecture.{name}", getattr(self, name), ">= 1")
        every = self.attention_every
        _require(every >= 0, "architecture.attention_every", every, ">= 0")
        divides = self.width % self.num_heads == 0
        _require(divides, "architecture.num_heads", self.num_heads, f"a divisor of {self.width}")
        dropout = self.dropout
        _require(0 <= dropout < 1, "architecture.dropout", dropout, "from 0 to below 1")
        std, time = self.initializer_std, self.max_timescale
        _require(0 < std < math.inf, "architecture.initializer_std", std, "> 0 and finite")
        fits = time is None or 2 <= time < math.inf
        _require(fits, "architecture.max_timescale", time, ">= 2 and finite")


@dataclass(kw_only=True)
class TextConfig:
    """How text becomes batches."""

    sequence_length: Annotated[int, arg(aliases=["--seq-len"])] = 256
    """Tokens per sequence."""
    batch_size: Annotated[int, arg(aliases=["--batch-size"])] = 8
    """Sequences per forward pass of one process."""
    global_batch_size: int | None = None
    """Sequences per optimiser step over all processes, in as many forward passes as it takes; None
    for one pass of each process that the run is started with."""
    carry_state: bool = False
    """A sequence goes on from the state after the one before it in its row, without gradients
    through it (truncated backpropagation through time); documents still begin anew."""
    held_out: float = 0.05
    """Share of the files kept for validation; of the bytes, when there is one file only. Prepared
    token data has its own."""
    validation_tokens: int = 262_144
    """Held-out tokens of a validation, spread evenly; 0 for all of them."""

    def __post_init__(self) -> None:
        check_whole_fields(self, "text.")
        _require(self.sequence_length >= 1, "text.sequence_length", self.sequence_length, ">= 1")
        _require(self.batch_size >= 1, "text.batch_size", self.batch_size, ">= 1")
        size = self.global_batch_size
        _require(size is None or size >= 1, "text.global_batch_size", size, ">= 1")
        _require(0 < self.held_out < 1, "text.held_out", self.held_out, "between 0 and 1")
        tokens = self.validation_tokens
        _require(tokens >= 0, "text.validation_tokens", tokens, ">= 0")


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimiser and what surrounds its step."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for the weights of the linear layers within blocks, AdamW for all
    others; at the same learning rate, by which both move weights about as far."""
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 3e-3
    """Peak of the schedule."""
    beta1: float = 0.9
    """Decay of the mean of the gradient, per step."""
    beta2: float = 0.95
    """Decay of the mean of its square, per step."""
    weight_decay: float = 0.1
    """Times the learning rate, per step; matrices only."""
    average_decay: float = 0.0
    """Decay of a mean of the weights, per step, such as 0.999: what is validated and saved as the
    model. 0 for the weights themselves."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 for no limit."""
    z_loss_weight: float = 1e-4
    """Weight of the mean squared log-partition in the loss."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; parameters, their gradients and sums stay float32."""

    def __post_init__(self) -> None:
        for name in ("weight_decay", "max_grad_norm", "z_loss_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"optimizer.{name}", value, ">= 0 and finite")
        for name in ("beta1", "beta2", "average_decay"):
            beta = getattr(self, name)
            _require(0 <= beta < 1, f"optimizer.{name}", beta, "from 0 to below 1")
        rate = self.learning_rate
        _require(0 < rate < math.inf, "optimizer.learning_rate", rate, "> 0 and finite")


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine to zero. Its length does not follow a later `--steps`."""

    length: int | None = None
    """Optimiser steps until the learning rate is zero; None for the larger of 500 and the steps
    that the run is started with."""
    warmup: float = 0.1
    """Share of the length that the learning rate rises."""

    def __post_init__(self) -> None:
        check_whole_fields(self, "schedule.")
        _require(self.length is None or self.length >= 1, "schedule.length", self.length, ">= 1")
        _require(0 <= self.warmup < 1, "schedule.warmup", self.warmup, "from 0 to below 1")


@dataclass(kw_only=True)
class ExecutionConfig:
    """How steps are computed; results stay the same, up to rounding."""

    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only the inputs of blocks and compute the rest again in the backward pass: less memory,
    about a third more work. auto: once memory runs out on a GPU; with several processes always."""
    compile: bool = False
    """Compile every block with torch.compile."""
    profile_steps: int = 0
    """Steps to record with torch.profiler into profile/, after two others; 0 for none."""
    sequence_parallel: int = 1
    """Processes that share each sequence, every one with an equal part of its time; divides their
    number and text.sequence_length."""

    def __post_init__(self) -> None:
        check_whole_fields(self, "execution.")
        steps = self.profile_steps
        _require(steps >= 0, "execution.profile_steps", steps, ">= 0")


@dataclass(kw_only=True)
class TrainConfig:
    """Train a language model."""

    data: Path | None = None
    """File or folder of texts, read as bytes; or a folder that `pararnn data prepare`
    wrote; None for the source of Python's standard library."""
    model: Annotated[str, arg(aliases=["--cell"])] = "paragru"
    """Architecture: a cell of the library, a memory such as m2rnn, or a stack such as
    3xparagru+m2rnn, repeated over the blocks; FILE.py:CLASS, a cell of your own, whose file is run
    and kept in the run folder; transformer or mamba2 as baselines."""
    cell_options: tuple[str, ...] = ()
    """Further arguments of cells, as NAME=VALUE."""
    memory_options: tuple[str, ...] = ()
    """Arguments of memories, as NAME=VALUE: key_size, value_size, shared_keys, nonlinearity."""
    out: Path | None = None
    """Run folder; None for the next free runs/MODEL-NUMBER."""
    steps: int = DEFAULT_STEPS
    """Optimiser steps to reach."""
    checkpoint_every: int = 100
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = 2
    """Last checkpoints to keep, besides that of the best validation."""
    validate_every: int = 250
    """Optimiser steps between validations while training; 0 for one at the end alone."""
    log: Literal["none", "wandb", "trackio", "mlflow"] = "none"
    """Send measurements there as well; the package must be installed."""
    seed: int = 0
    """Of the initial weights and of the order of the data."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""
    backend: str = "auto"
    """Kernels of the recurrence, as in `pararnn.RNN`."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_whole_fields(self)
        self.data, self.out = (p if p is None else Path(p) for p in (self.data, self.out))
        _require(self.steps >= 1, "steps", self.steps, ">= 1")
        _require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, ">= 1")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, ">= 1")
        _require(self.validate_every >= 0, "validate_every", self.validate_every, ">= 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to below 2**63")
        check_architecture(self.model)
        check_name(self.backend)
        every = self.architecture.attention_every
        dropout, ours = self.architecture.dropout, self.model not in BASELINES
        _require(not every or ours, "architecture.attention_every", every, f"0 for {self.model}")
        _require(not dropout or ours, "architecture.dropout", dropout, f"0 for {self.model}")
        for name in ("cell_options", "memory_options"):
            self.options_of(name)
        split, length = self.execution.sequence_parallel, self.text.sequence_length
        name = "execution.sequence_parallel"
        _require(split == 1 or ours, name, split, f"1 for {self.model}")
        wanted = f"a divisor of text.sequence_length, {length}"
        _require(split >= 1 and length % split == 0, name, split, wanted)
        attends = ATTENTION in self.mixers
        if self.text.carry_state and (attends or not ours):
            raise ValueError(
                f"text.carry_state needs a state of fixed size, but {self.model} "
                f"{'has blocks of attention' if attends else 'hands on none'}."
            )

    @property
    def title(self) -> str:
        """The architecture in a word."""
        own = OwnName.of(self.model)
        return own.kind if own else self.model

    @property
    def mixers(self) -> list[str]:
        """Mixer of each block: those of the stack in turn, or attention in every N-th block.

        All parts of a stack that is longer than the model, which is then not built; none of a
        baseline.
        """
        if self.model in BASELINES:
            return []
        stack, every = parts(self.model), self.architecture.attention_every
        found = repeated(stack, max(len(stack), self.architecture.num_layers))
        return [ATTENTION if every and i % every == 0 else n for i, n in enumerate(found, 1)]

    def options_of(self, field: str) -> dict[str, Any]:
        """`cell_options` or `memory_options` as values of Python."""
        return read_options(field, getattr(self, field))


def check_new(config: TrainConfig) -> None:
    """Raise ValueError for options that no block takes, before a new run starts.

    A stored run may have them: it began before they were refused, and its checkpoints are known by
    all of its options.
    """
    fields = ("cell_options", "memory_options")
    options = {name: " ".join(getattr(config, name)) for name in fields}
    check_used(config.mixers, config.model, options)


MAY_CHANGE = (
    *("out", "steps", "checkpoint_every", "keep_checkpoints", "device", "backend"),
    *("validate_every", "log"),
    *("text.batch_size", "execution"),
)
"""Settings that a resumed run may change; all others decide the loss curve."""


def resolve(config: TrainConfig, num_processes: int = 1) -> TrainConfig:
    """Replace the values that depend on others or on the place; idempotent.

    Raises:
        RunError: The processes cannot share the sequences of an optimiser step.
    """
    length = config.schedule.length or max(DEFAULT_STEPS, config.steps)
    split = config.execution.sequence_parallel
    if num_processes % split:
        raise RunError(
            f"{num_processes} processes cannot share sequences by {split} each "
            "(execution.sequence_parallel). Start a multiple of that with torchrun "
            "--nproc-per-node, or give another --execution.sequence-parallel."
        )
    at_once = config.text.batch_size * num_processes // split
    per_step = config.text.global_batch_size or at_once
    if per_step % at_once:
        raise RunError(
            f"{per_step} sequences per optimiser step (text.global_batch_size) are not a multiple "
            f"of {config.text.batch_size} (text.batch_size) x {num_processes // split} (processes"
            f"{' that have sequences of their own' if split > 1 else ''}). Give "
            "another --text.batch-size or start another number of processes."
        )
    return dataclasses.replace(
        config,
        data=None if config.data is None else _absolute(config.data),
        text=dataclasses.replace(config.text, global_batch_size=per_step),
        schedule=dataclasses.replace(config.schedule, length=length),
    )


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except (RuntimeError, ValueError) as error:  # no such user, links in a circle, a zero byte
        raise RunError(f"data path {str(path)!r} leads nowhere: {error}.") from error


def check_resumable(stored: TrainConfig, wanted: TrainConfig) -> None:
    """Raise RunError when resolved settings would change the loss curve of a run."""
    before, after = leaves(to_dict(stored)), leaves(to_dict(wanted))
    changed = [
        f"{name} from {old} to {after[name]}"
        for name, old in before.items()
        if old != after[name] and not _may_change(name)
    ]
    if changed:
        raise RunError(
            f"a resumed run keeps its settings, but this would change {', '.join(changed)}. Leave "
            "these flags out, or start a new run with another --out."
        )


def identity(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that decides the loss curve."""
    found = leaves(to_dict(config))
    for name, before in _SINCE.items():  # as in runs that began without the field
        if found[name] == before:
            del found[name]
    return {name: v for name, v in found.items() if name != "data" and not _may_change(name)}


def _may_change(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    values = dataclasses.asdict(config)
    as_json = {Path: str, type(Path()): str, tuple: list}
    return {name: as_json.get(type(v), lambda x: x)(v) for name, v in values.items()}


def read_settings(path: Path) -> TrainConfig:
    """The settings in a JSON file, as `--print-config` prints them; what it lacks is the default.

    Raises:
        RunError: The file cannot be read, or a setting in it is unknown or refused.
    """
    try:
        given = read_json(path)
        return from_dict(TrainConfig, _filled(to_dict(TrainConfig()), given))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(
            f"cannot take settings from {path}: {reason}. pararnn train --print-config prints such "
            "a file."
        ) from error


def _filled(defaults: Any, given: Any) -> Any:
    """Nested values, with defaults where there are none."""
    if not isinstance(defaults, dict) or not isinstance(given, dict):
        return given
    names = {**defaults, **given}
    return {n: _filled(defaults.get(n), given.get(n, defaults.get(n))) for n in names}


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`.

    Raises:
        ValueError: A field is missing, unknown or holds something else than it should.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is {repr(values)[:80]}, no object")
    if missing := set(hints) - _MAY_LACK - set(values):
        raise ValueError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    if unknown := set(values) - set(hints):
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    return kind(**{name: _restore(hints[name], name, value) for name, value in values.items()})


_SINCE: dict[str, Any] = {
    "cell_options": [],
    "memory_options": [],
    "architecture.state_size": 128,
    "architecture.dropout": 0.0,
    "text.carry_state": False,
    "optimizer.algorithm": "adamw",
    "optimizer.average_decay": 0.0,
}
"""Settings that decide the curve and runs may have begun without, and what they did then."""
_MAY_LACK = {name.rpartition(".")[2] for name in _SINCE} | {
    *("attention_every", "validate_every", "log", "sequence_parallel")
}


_FORMERLY = {"activation_checkpointing": {True: "on", False: "off"}}  # values that meant the same


def _restore(hint: Any, name: str, value: Any) -> Any:
    if isinstance(value, bool):
        value = _FORMERLY.get(name, {}).get(value, value)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    options = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError(f"{name} is {repr(value)[:80]}")
    if typing.get_origin(hint) is Literal:
        valid = value in options
    else:
        allowed = options if isinstance(hint, types.UnionType) else (hint,)
        if isinstance(value, str) and Path in allowed:
            return Path(value)
        whole = float in allowed and type(value) is int and abs(value) < 2**53
        valid = type(value) in allowed or whole
    if not valid:
        raise ValueError(f"{name} is {repr(value)[:80]}")
    return value


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {wanted}.")
