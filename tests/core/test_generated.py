"""What is generated for four cells is what was reviewed."""

import pytest
import torch

from .conftest import needs_triton
from .generated import texts
from .golden import FOLDER

pytestmark = needs_triton
NAMES = ("gru.py", "gru.c", "slstm.py", "slstm.c", "heads.py", "heads.c", "dense.py", "dense.c")
NAMES += ("heads_wide.py", "dense_wide.py", "heads_spread.py", "dense_spread.py")


@pytest.fixture(scope="module")
def generated():
    return texts()


def test_every_text_has_a_file(generated):
    assert sorted(generated) == sorted(NAMES)


@pytest.mark.skipif(
    torch.__version__ >= torch.torch_version.TorchVersion("2.14"),
    reason="from PyTorch 2.14 on, clamp has no gradient at its bound",
)
@pytest.mark.parametrize("name", NAMES)
def test_generated_text(generated, name):
    assert generated[name].splitlines() == (FOLDER / name).read_text().splitlines()
