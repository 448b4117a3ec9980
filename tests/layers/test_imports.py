"""What the package needs to be imported, in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pararnn

SCRIPT = """
import sys
from pathlib import Path
for name in {missing}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch, pararnn
rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(3, 4))
y, _ = rnn(torch.randn(2, 9, 3))
y.sum().backward()
print(*(name for name in {unwanted} if sys.modules.get(name)))
"""
EXTRAS = ["triton", "transformers", "matplotlib", "tyro", "datasets", "lm_eval"]


@pytest.mark.parametrize("missing", [[], EXTRAS], ids=["all", "none"])
def test_a_layer_needs_nothing_but_pytorch(missing):
    """Nor does importing it load what only other parts need."""
    script = SCRIPT.format(missing=missing, unwanted=EXTRAS)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


ROOT = Path(pararnn.__file__).parent
CORE = "cells tracing planning solvers kernels layers".split()
ROOMS = [*CORE, *"distributed testing diagnosis explanation bench lm tasks reproduce cli".split()]
ROOMS_OF_LM = "catalogue linear presets data models decoding training evaluation bench".split()


def imports(path):
    """Modules of the package that a file names, at its top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pararnn."):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("pararnn."))


@pytest.mark.parametrize(("folder", "rooms"), [("", ROOMS), ("lm", ROOMS_OF_LM)], ids=["all", "lm"])
def test_nothing_imports_upwards(folder, rooms):
    root = ROOT / folder
    prefix = ".".join(["pararnn", *filter(None, [folder])]) + "."
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        if room.startswith("_"):
            continue  # the package itself
        below = rooms[: rooms.index(room) + 1]
        for name in imports(path):
            if name.startswith(prefix):
                other = name.removeprefix(prefix).split(".")[0]
                assert other in below or other.startswith("_"), f"{path} imports {name}"


def test_no_import_circles():
    """Nor circles of imports for types alone."""
    needs = {}
    for path in ROOT.rglob("*.py"):
        if path.name == "__init__.py":
            continue
        name = ".".join(["pararnn", *path.relative_to(ROOT).with_suffix("").parts])
        needs[name] = set()
        for found in imports(path):
            module = (
                found if (ROOT / Path(*found.split(".")[1:]).with_suffix(".py")).exists() else ""
            )
            needs[name].add(module or found.rpartition(".")[0])
    done = set()

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name in done or name not in needs:
            return
        for other in sorted(needs[name]):
            visit(other, [*above, name])
        done.add(name)

    for name in needs:
        visit(name, [])
