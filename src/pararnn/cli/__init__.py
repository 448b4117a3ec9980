"""The `pararnn` command: `train`, `generate` and `eval`."""

from pararnn.cli.main import main as main
