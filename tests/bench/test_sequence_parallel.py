"""The benchmark of a split sequence runs, and checks its results before it times them."""

from pathlib import Path

import torch
from training.launch import Launch

BENCHMARK = Path(__file__).parents[2] / "benchmarks/sequence_parallel.py"


def test_a_table_of_all_cells(tmp_path):
    sizes = "--device cpu --time 4096 --width 8 --dtype float32 --repeats 1".split()
    with Launch(2, BENCHMARK, *sizes, folder=tmp_path) as launched:
        printed = launched.wait()
    assert f"2 x CPU, PyTorch {torch.__version__}" in printed
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == [
        *("| forgets", "| slow gates, to 1,024 steps", "| forgets nothing")
    ]
    assert [int(row[1]) for row in rows] == [1, 2, 2]
