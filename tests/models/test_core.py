"""Language models use the core through its layers."""

import ast
from pathlib import Path

import pytest

import pararnn.lm

ALLOWED = (
    "pararnn.distributed",
    "pararnn.layers",
    "pararnn.cells",
    "pararnn.lm",
    "pararnn.bench",
    "pararnn.planning.costs",
    "pararnn.planning.backends",  # their names
    "pararnn._lazy",
    "pararnn._whole",
    "pararnn._words",
    "pararnn.testing",
)


@pytest.mark.parametrize(
    "path", sorted(Path(pararnn.lm.__file__).parent.rglob("*.py")), ids=lambda p: p.stem
)
def test_language_models_know_only_the_layers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pararnn."):
            assert node.module.startswith(ALLOWED), f"line {node.lineno}: {node.module}"
