"""`pararnn reproduce` on a GPU: every method runs and is exact, in graphs and in processes."""

import json

import pytest

from pararnn.reproduce import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["figure-1", "figure-5", "figure-6", "figure-4"])
def test_every_method_runs(name, tmp_path):
    result = run(name, preset="smoke", device="cuda", out=tmp_path)
    assert all("mamba" in reason for reason in result.left_out.values()), result.left_out
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert report["tables"][0]["rows"]
