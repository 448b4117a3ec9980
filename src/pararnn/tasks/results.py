"""Results of a suite in its folder: JSON, tables, and plots where matplotlib is."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from pathlib import Path

import torch

import pararnn
from pararnn.lm.data.files import read_json, write_atomically
from pararnn.lm.data.words import say
from pararnn.tasks.report import Result, order, page


def save_results(out: Path, command: str, failed: dict[str, str]) -> list[Result]:
    """Write `results.json`, `results.md` and the plots from all models in a folder.

    Args:
        out: The folder of a suite.
        command: Stored with them.
        failed: Models that ended in an error, stored with them.

    Returns:
        All results, in the order of tasks, architectures and seeds.
    """
    paths = sorted(out.glob("models/*/result.json"))
    results = sorted((read_json(path) for path in paths), key=order)
    facts = {
        "pararnn": pararnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
    stored = {"facts": facts, "failed": failed, "results": results}
    write_atomically(out / "results.json", (json.dumps(stored, indent=1) + "\n").encode())
    if not results:
        return results
    write_atomically(out / "results.md", page(results, facts).encode())
    if importlib.util.find_spec("matplotlib") is None:
        say(
            f"No plots: matplotlib is not installed; {out / 'results.json'} has all figures. "
            'Install it with pip install "pararnn[plots]" and give the command again.'
        )
        return results
    from pararnn.tasks.plots import plot_heat_map, plot_lengths

    plot_heat_map(results, out / "heat-map.png")
    plot_lengths(results, out / "lengths.png")
    return results
