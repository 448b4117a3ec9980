"""What the package needs to be imported, in fresh processes."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
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
