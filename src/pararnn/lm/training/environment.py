"""What a run was made with, for `env.txt`."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import pararnn

PACKAGES = ("torch", "transformers", "numpy", "safetensors", "tyro", "tensorboard")


def describe_environment(device: torch.device, num_processes: int = 1) -> str:
    """Versions, machine and commit, one per line."""
    facts = {
        "pararnn": pararnn.__version__,
        "commit": _commit() or "not a git checkout",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor cores": str(os.cpu_count()),
        "processes": str(num_processes),
        "torch threads": str(torch.get_num_threads()),
        "device": str(device),
        "command": " ".join(sys.argv),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return "".join(f"{name}: {value}\n" for name, value in facts.items())


def _commit() -> str | None:
    """Commit of the checkout that the package is imported from, if it is one."""
    root = Path(pararnn.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
