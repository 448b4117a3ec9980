"""Finds the command, and reports errors that the user can correct in one message."""

import difflib
import importlib
import os
import sys
import threading

from pararnn._version import __version__

COMMANDS = {
    "train": ("pararnn.cli.train", "Train a language model."),
    "generate": ("pararnn.cli.generate", "Continue a text with a trained model."),
    "eval": ("pararnn.cli.evaluate", "Measure a trained model in bits per byte, or by tasks."),
    "data": ("pararnn.cli.data", "Prepare token data for training."),
    "tasks": ("pararnn.cli.tasks", "Train small models on synthetic tasks."),
    "reproduce": ("pararnn.cli.reproduce", "Measure the paper's figures and tables."),
    "bench": ("pararnn.cli.bench", "Time the kernels, generation and train steps."),
}
EXTRA = frozenset({"numpy", "transformers", "tyro", "tensorboard", "safetensors", "tqdm"})
FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None for those of the process.

    Returns:
        Exit status: 0; 1 for a run that failed; 2 for wrong arguments; 128 plus the number of the
        signal for a run that a signal stopped.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"pararnn {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        return _fail(f"there is no command {name!r}; perhaps you meant {nearest!r}.", MISUSED)
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    from pararnn.lm.data.errors import LostConnectionError, RunError

    try:
        return importlib.import_module(COMMANDS[name][0]).run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        return _fail(
            f"{name} needs the package {package}, which is not installed; install the extra: "
            'pip install "pararnn[train]"',
            FAILED,
        )
    except LostConnectionError as error:
        _end_within(1.0)
        return _fail(str(error), FAILED)
    except RunError as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except MemoryError:
        return _fail(f"out of memory in {name}; give it less data at once.", FAILED)
    except RecursionError as error:
        return _fail(f"{name} read something that is nested too deeply ({error}).", FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.", FAILED)


def _end_within(seconds: float) -> None:
    """End this process after some seconds, even if a thread still waits.

    A thread that writes a checkpoint may wait for a process that waits for this one to end.
    """
    timer = threading.Timer(seconds, os._exit, (FAILED,))
    timer.daemon = True
    timer.start()


def _fail(message: str, status: int) -> int:
    print(f"pararnn: {message}", file=sys.stderr)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pararnn COMMAND [OPTIONS]",
            "",
            "Nonlinear RNNs trained in parallel over the sequence.",
            "",
            *commands,
            "",
            "pararnn COMMAND --help lists the options; pararnn --version prints the version.",
        ]
    )
