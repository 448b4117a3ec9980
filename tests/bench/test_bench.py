"""`pararnn bench` where there is no GPU, and what it writes about one."""

import json

import pytest
import torch

from pararnn.bench import measure, save
from pararnn.cli.main import main


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--out", str(tmp_path / "out")]) == 1
    assert "measures on a CUDA device, and there is none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="CUDA device"):
        next(measure())


def row(**more):
    times = {"limit_forward_ms": 0.1, "limit_backward_ms": 0.2}
    times |= {"forward_ms": 0.11, "backward_ms": 0.25}
    return {"cell": "ParaGRU", "size": "B1 T512 D64", "slow": True, "error": 2e-3} | times | more


def test_report(tmp_path):
    rows = {
        "device": [{"name": "A GPU", "copy_gigabytes_per_second": 3000.4}],
        "recurrence": [
            row(iterations=2, chunks=4, sequential_forward_ms=0.5, sequential_backward_ms=0.75)
        ],
        "loop": [{"size": "B1 T512 D64", "time": 512, "ours_ms": 0.05, "loop_ms": 300.0}],
        "layer": [{"size": "B1 T512 D64", "paragru_forward_ms": 0.4, "paragru_both_ms": 1.5}],
        "skipped": [{"what": "something: not installed"}],
        "length": [row(iterations=1, chunks=1)],
    }
    save(rows, tmp_path, "pararnn bench")
    text = (tmp_path / "gpu.md").read_text()
    line = "| ParaGRU | B1 T512 D64 | slow | 0.1100 | 1.10 | 0.2500 | 1.25 | 0.500 / 0.750 | 2 |"
    assert line in text
    assert "| B1 T512 D64 | 0.050 | 300 | 6,000 |" in text
    assert "| B1 T512 D64 | 0.400 / 1.500 |  |  |" in text
    assert "Skipped: something: not installed." in text
    assert "`pararnn bench` on one A GPU, which copies 3,000 GB/s" in text
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["recurrence"] == rows["recurrence"]
    assert stored["facts"]["torch"] == torch.__version__
    assert (tmp_path / "gpu.png").stat().st_size > 1000
