"""`pararnn train`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pararnn.cli.arguments import parse
from pararnn.lm.data.errors import OtherProcessError
from pararnn.lm.training.config import TrainConfig, resolve
from pararnn.lm.training.presets import preset_config
from pararnn.lm.training.run_folder import RunFolder, config_json, latest_run


@dataclass(kw_only=True)
class TrainArguments:
    """Train a language model.

    Without any option: a ParaGRU on the source of Python's standard library, in about two minutes
    on two processor cores.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Continue the run in --out, or the last one in runs/; its own settings hold."""
    size: str | None = None
    """400m, 1b, 2.9b or 7b: the paper's model of that size and its training settings, which the
    other options change."""
    print_config: bool = False
    """Print the settings as JSON and stop."""

    def __post_init__(self) -> None:
        if self.size is not None:
            if self.resume:
                raise ValueError("--size does not work with --resume; a run keeps its settings.")
            preset_config(self.config.model, self.size)


def run(arguments: list[str]) -> int:
    """Train. Returns 0, or 128 plus the number of the signal that stopped it.

    One of several processes returns 0 after a signal: everything is saved and reported, and
    `torchrun` would take any other status for a failure and print a traceback. If another process
    has reported an error, returns 1 without a message.
    """
    parsed = parse(TrainArguments, "train", arguments)
    if parsed.resume:
        path = parsed.config.out or latest_run()
        stored = dataclasses.replace(RunFolder.open(path).read_config(), out=path)
        default = TrainArguments(config=stored)
        parsed = parse(TrainArguments, "train", arguments, default)
    elif parsed.size is not None:
        default = TrainArguments(config=preset_config(parsed.config.model, parsed.size))
        parsed = parse(TrainArguments, "train", arguments, default)
    if parsed.print_config:
        print(config_json(resolve(parsed.config)), end="")
        return 0
    from pararnn.lm.training import train
    from pararnn.lm.training.parallel import num_processes

    try:
        result = train(parsed.config, resume=parsed.resume)
    except OtherProcessError:
        return 1
    return 0 if result.stopped_by is None or num_processes() > 1 else 128 + result.stopped_by
