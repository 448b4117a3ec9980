"""A handful of kernels compiled for an H100, against what they took; `registers` measures all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import needs_triton

pytestmark = needs_triton

ROOT = Path(__file__).parents[2]
ROWS = {
    "gru half one none": 3,
    "matvec half": 1,
    "matvec_texts half": 1,
    "wide_gru auto none": 8,
    "m2rnn half none": 2,
}
TOLERANCE = 4  # registers


@pytest.mark.parametrize("case", ROWS)
def test_kernels_take_no_more_registers(case, tmp_path):
    import triton

    old = json.loads((ROOT / "tests" / "golden" / "registers.json").read_text())
    if old["triton"] != triton.__version__:
        pytest.skip(f"measured with Triton {old['triton']}, and this is {triton.__version__}")
    file = tmp_path / "new.json"
    command = [sys.executable, "-m", "tests.core.registers", "--only", case, "--write", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    new = json.loads(file.read_text())["kernels"]
    assert len(new) == ROWS[case]
    for name, row in new.items():
        before = old["kernels"][name]
        assert row["registers"] <= before["registers"] + TOLERANCE, (name, row, before)
        assert row["spills"] <= before["spills"], (name, row, before)
