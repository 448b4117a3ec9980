"""`pararnn bench` where there is no GPU, and what it writes about one."""

import json

import pytest
import torch

from pararnn import RNN
from pararnn.bench import Size, measure, save
from pararnn.bench.others import pararnn_torch_rows
from pararnn.bench.problem import CELLS
from pararnn.cli.main import main
from pararnn.kernels.lowering import lower
from pararnn.tracing.expressions import topological


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["bench"], ["bench", "kernels"]):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert "measures on a CUDA device, and there is none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="CUDA device"):
        next(measure())


def test_pararnn_torch_runs_in_a_process_of_its_own(tmp_path):
    """A package of that name that is not it: the message of that process is passed on."""
    (tmp_path / "pararnn.py").write_text("")
    with pytest.raises(RuntimeError, match=r"pararnn\.py is not pararnn-torch"):
        pararnn_torch_rows(str(tmp_path), [Size(1, 8, 4)])


def test_invented_cell_is_no_smaller_than_paragru():
    """Of the same size, so that their times may be compared."""
    counts = []
    for name in ("ParaGRU", "invented"):
        recurrence = RNN(CELLS[name](8)).runner().traced.step.recurrence
        nodes = topological(lower([*recurrence.step, *recurrence.jacobian[0]]))
        counts.append((recurrence.num_drives, recurrence.num_coefficients, len(nodes)))
    assert counts[0][:2] == counts[1][:2]
    assert counts[1][2] >= counts[0][2]


def row(**more):
    times = {"limit_forward_ms": 0.1, "limit_backward_ms": 0.2}
    times |= {"forward_ms": 0.11, "backward_ms": 0.25, "extra_memory": 0.0123}
    return {"cell": "ParaGRU", "size": "B1 T512 D64", "slow": True, "error": 2e-3} | times | more


def test_report(tmp_path):
    rows = {
        "device": [{"name": "A GPU", "copy_gigabytes_per_second": 3000.4}],
        "recurrence": [
            row(iterations=2, chunks=4, sequential_forward_ms=0.5, sequential_backward_ms=0.75)
        ],
        "loop": [{"size": "B1 T512 D64", "time": 512, "ours_ms": 0.05, "loop_ms": 300.0}],
        "layer": [{"size": "B1 T512 D64", "paragru_forward_ms": 0.4, "paragru_both_ms": 1.5}],
        "pararnn_torch": [{"size": "B1 T512 D64", "paragru_forward_ms": 2, "paragru_both_ms": 5}],
        "skipped": [{"what": "something: not installed"}],
        "wrong": [{"what": "ParaGRU B1: error 5e-1"}],
        "length": [row(iterations=1, chunks=1)],
    }
    save(rows, str(tmp_path), "pararnn bench")
    text = (tmp_path / "gpu.md").read_text()
    line = "| ParaGRU | B1 T512 D64 | slow | 0.1100 | 1.10 | 0.2500 | 1.25 | 0.500 / 0.750 | "
    assert line + "4 | 2 | 1.2% | 2e-03 |" in text
    assert "| B1 T512 D64 | 0.050 | 300 | 6,000 |" in text
    assert "| B1 T512 D64 | 0.400 / 1.500 |  | 2.000 / 5.000 |  |" in text
    assert "Skipped: something: not installed." in text
    assert "Wrong: ParaGRU B1: error 5e-1." in text
    assert "`pararnn bench` on one A GPU, which copies 3,000 GB/s" in text
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["recurrence"] == rows["recurrence"]
    assert stored["facts"]["torch"] == torch.__version__
    assert (tmp_path / "gpu.png").stat().st_size > 1000
