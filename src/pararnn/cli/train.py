"""`pararnn train`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pararnn.cli.arguments import parse, refused
from pararnn.cli.output import Output
from pararnn.lm.data.errors import OtherProcessError
from pararnn.lm.training.config import TrainConfig, check_new, read_settings, resolve
from pararnn.lm.training.presets import preset_config
from pararnn.lm.training.run_folder import RunFolder, config_json, latest_run


@dataclass(kw_only=True)
class TrainArguments(Output):
    """Train a language model.

    Without any option: a ParaGRU on the source of Python's standard library, in about two minutes
    on two processor cores.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Continue the run in --out, or the last one in runs/; its own settings hold."""
    size: str | None = None
    """400m, 1b, 2.9b or 7b: the paper's model of that size and its training settings, which the
    other options change. Other stacks have those of ParaGRU."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """Settings as --print-config prints them, or some of them; other options change them."""
    print_config: bool = False
    """Print the settings as JSON and stop."""
    no_comparison: bool = False
    """Do not time the model against the same one run step by step at the end."""

    def __post_init__(self) -> None:
        names = ("resume", "size", "config_file")
        given = [f"--{n.removesuffix('_file')}" for n in names if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} does not work with {given[1]}; give one of them.")
        if self.size is not None:
            preset_config(self.config.model, self.size)


def run(arguments: list[str]) -> int:
    """Train. Returns 0, or 128 plus the number of the signal that stopped it.

    One of several processes returns 0 after a signal: everything is saved and reported, and
    `torchrun` would take any other status for a failure and print a traceback. If another process
    has reported an error, returns 1 without a message.
    """
    parsed = parse(TrainArguments, "train", arguments)
    if (stored := _stored(parsed)) is not None:
        parsed = parse(TrainArguments, "train", arguments, TrainArguments(config=stored))
    if not parsed.resume:
        with refused("train"):
            check_new(parsed.config)
    if parsed.print_config:
        print(config_json(resolve(parsed.config)), end="")
        return 0
    from pararnn.lm.training import train
    from pararnn.lm.training.parallel import num_processes

    try:
        with parsed.messages():
            result = train(parsed.config, resume=parsed.resume, comparison=not parsed.no_comparison)
    except OtherProcessError:
        return 1
    return 0 if result.stopped_by is None or num_processes() > 1 else 128 + result.stopped_by


def _stored(parsed: TrainArguments) -> TrainConfig | None:
    """The settings that the options change, where these are not the defaults."""
    if parsed.resume:
        path = parsed.config.out or latest_run()
        return dataclasses.replace(RunFolder.open(path).read_config(), out=path)
    if parsed.size is not None:
        return preset_config(parsed.config.model, parsed.size)
    return None if parsed.config_file is None else read_settings(parsed.config_file)
