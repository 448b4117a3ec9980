"""`pararnn reproduce`: every name on a CPU, labels, resumption, errors."""

import importlib.util
import json
import signal
import subprocess
import sys

import pytest
import torch

import pararnn
from pararnn.cli.main import main
from pararnn.lm.training import RunError, TrainConfig
from pararnn.lm.training.config import resolve
from pararnn.lm.training.run_folder import config_json
from pararnn.reproduce import methods, points, quoted, residuals, run, speed
from pararnn.reproduce.catalogue import ALL, CATALOGUE, names_of
from pararnn.reproduce.methods import CELLS, METHODS, Problem
from pararnn.reproduce.newton import residuals as newton_residuals
from pararnn.reproduce.parts import PARTS
from pararnn.reproduce.report import Column, Line, Panel, Report, Table, markdown

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
SPEED = ("figure-1", "figure-5", "figure-6")


def smoke(name, out, **options):
    return run(name, **{"preset": "smoke", "device": "cpu", "out": out, **options})


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take most of the time of small measurements."""
    monkeypatch.setattr("pararnn.reproduce.plots.plot", lambda report, path: None)


def stored(out, name):
    return json.loads((out / f"{name}.json").read_text())


def numbers(report):
    """Labels of the columns that hold numbers which are no key, and of the lines."""
    for table in report["tables"]:
        for place, column in enumerate(table["columns"]):
            if column["origin"] and any(isinstance(row[place], float) for row in table["rows"]):
                yield column["origin"]
    for panel in report["panels"]:
        yield from (line["origin"] for line in panel["lines"])


def check_files(out, name):
    """JSON, Markdown and plot are there, and every number has an origin."""
    report = stored(out, name)
    assert report["paper"] == quoted.PAPER
    assert set(numbers(report)) <= {"measured", "quoted", "estimated"}
    page = (out / f"{name}.md").read_text()
    assert page.startswith(f"# {report['title']}\n")
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return report, page


def test_figures_of_speed(tmp_path):
    for name in SPEED:
        result = smoke(name, tmp_path)
        assert result.stopped_by is None
        reasons = set(result.left_out.values())
        assert all("graph" in reason or "mamba" in reason for reason in reasons), reasons
        report, page = check_files(tmp_path, name)
        (one, *_) = report["runs"]
        assert one["torch"] == torch.__version__
        assert one["pararnn"] == pararnn.__version__
        assert one["command"].startswith("pararnn.reproduce.run('figure-")
        assert "not quoted" in page
        assert "Left out: loop in a graph" in page
    ratios = [row[5] for row in stored(tmp_path, "figure-1")["tables"][0]["rows"]]
    assert len(ratios) == 4
    assert all(ratio > 0 for ratio in ratios)
    assert "quoted" in set(numbers(stored(tmp_path, "figure-1")))


def test_methods_are_compared_before_they_are_timed():
    class Wrong(methods._Loop):
        def forward(self, x):
            y, state = super().forward(x)
            return y * 1.001, state

    problem = Problem("ParaGRU", 1, 5, 4, torch.device("cpu"))
    wrong = methods.Method("wrong", "", Wrong)
    with pytest.raises(AssertionError, match="against float64; it is not timed"):
        methods.prepared(problem, wrong, "forward")


@pytest.mark.parametrize("cell", CELLS)
def test_methods_give_what_the_loop_gives(cell):
    problem = Problem(cell, 2, 9, 6, torch.device("cpu"))
    for method in METHODS.values():
        if method.exact:
            assert problem.error(method.make(problem.cell)) < 1e-5, method.name


def test_long_references_are_those_of_the_loop():
    short = Problem("ParaLSTM", 1, 2**9 + 1, 3, torch.device("cpu"))
    assert short.error(methods._Loop(short.cell)) < 1e-5


@pytest.mark.usefixtures("no_plots")
def test_resumes_by_points(tmp_path, monkeypatch, capsys):
    """A signal ends it after a point; the same command measures the others and no other."""
    timed = []
    time = speed.call_milliseconds

    def interrupted(call, *args, **options):
        timed.append(1)
        if len(timed) == 3:
            signal.raise_signal(signal.SIGINT)
        return time(call, *args, **options)

    monkeypatch.setattr(speed, "call_milliseconds", interrupted)
    result = smoke("figure-1", tmp_path)
    assert result.stopped_by == signal.SIGINT
    assert "The same command goes on" in capsys.readouterr().out
    first = json.loads((tmp_path / points.FILE).read_text())["points"]
    measured = {name: v for name, v in first.items() if "ms" in v}
    assert len(measured) == len(timed) == 3
    assert (tmp_path / "figure-1.md").exists()
    assert smoke("figure-1", tmp_path).stopped_by is None
    assert len(timed) == 8
    after = json.loads((tmp_path / points.FILE).read_text())["points"]
    assert {name: after[name] for name in measured} == measured
    smoke("figure-1", tmp_path)
    assert len(timed) == 8
    smoke("figure-1", tmp_path, width=8)
    assert len(timed) == 16


@pytest.mark.usefixtures("no_plots")
def test_a_point_that_fails_is_left_out_and_tried_again(tmp_path, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no luck\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(speed, "call_milliseconds", fails)
        result = smoke("figure-1", tmp_path)
    assert list(result.left_out.values()).count("RuntimeError: no luck") == 8
    assert "RuntimeError: no luck" in (tmp_path / "figure-1.md").read_text()
    assert len(smoke("figure-1", tmp_path).left_out) == 4


def test_figure_4(tmp_path):
    smoke("figure-4", tmp_path)
    report, page = check_files(tmp_path, "figure-4")
    rows = report["tables"][0]["rows"]
    assert len(rows) == 2 * 2 * 2 * 2
    assert {tuple(row[:2]) for row in rows} == {
        (cell, stage) for cell in residuals.MODELS.values() for stage in residuals.STAGES.values()
    }
    for row in rows:
        assert row[4] > row[5] > row[6]
        assert 1 <= row[9] <= 4
    assert len(report["panels"]) == 4
    assert "4 steps of 2 sequences of 32 bytes" in page
    trained = tmp_path / "figure-4" / "paragru"
    other = tmp_path / "other"
    result = smoke("figure-4", other, runs=[trained])
    assert result.left_out == {}
    again = stored(other, "figure-4")["tables"][0]["rows"]
    assert again == [row for row in rows if row[0] == "ParaGRU"]
    assert f"Trained models: {trained}." in (other / "figure-4.md").read_text()


@pytest.mark.parametrize("cell", CELLS)
def test_newton_is_exact_after_as_many_iterations_as_steps(cell):
    """Each iteration makes one more step exact; the residual begins with the first guess."""
    module = CELLS[cell](3, 3).double()
    x = 2 * torch.randn(2, 7, 3, dtype=torch.float64)
    found = newton_residuals(module, x, 7)
    assert len(found) == 8
    assert found[-1] < 1e-15
    zero = torch.zeros(2, 3, dtype=torch.float64)
    state = (zero, zero) if cell == "ParaLSTM" else zero
    parts = lambda s: s if isinstance(s, tuple) else (s,)  # noqa: E731
    with torch.no_grad():
        guess = [module(x_t, state) for x_t in x.unbind(1)]
        pairs = zip(guess[:-1], x.unbind(1)[1:], guess[1:], strict=True)
        gaps = [
            (n - g).abs().max()
            for before, x_t, after in pairs
            for n, g in zip(parts(module(x_t, before)), parts(after), strict=True)
        ]
    assert found[0] == pytest.approx(float(max(gaps)), rel=1e-12)


def test_table_3(tmp_path):
    result = smoke("table-3", tmp_path)
    assert all("mamba" in reason for reason in result.left_out.values())
    report, page = check_files(tmp_path, "table-3")
    rows = {row[1]: row for row in report["tables"][0]["rows"]}
    assert rows["Transformer"][8] == 1.0
    assert rows["ParaGRU"][7] == 95.7
    assert rows["ParaGRU"][9] == pytest.approx(95.7 / 81.0)
    assert rows["ParaGRU"][6] is None  # models of other sizes have no estimate
    assert "1.7e+15 operations per second" in page


def test_estimate_of_eight_gpus(tmp_path):
    """By hand: 24 of the paper's 32 sequences, and 7/8 of 8 bytes per parameter at 450 GB/s."""
    from pararnn.reproduce.train_steps import _estimate

    values = {"step_ms": 300.0, "batch": 24, "parameters": 450_000_000}
    assert _estimate(values, "400m", "paragru") == "400 to 407"
    assert _estimate(values, "2.9b", "paragru") is None
    assert _estimate({}, "400m", "paragru") is None


def test_table_6(tmp_path):
    result = smoke("table-6", tmp_path)
    assert result.stopped_by is None
    report, _ = check_files(tmp_path, "table-6")
    rows = report["tables"][0]["rows"]
    assert len(rows) == 5 * 4
    assert {row[4] for row in rows} == {1}
    quotes = {(row[0], row[1]): row[-1] for row in rows}
    assert quotes["parity", "Transformer"] == 53
    assert quotes["2-hop", "Mamba2"] == 98
    assert report["runs"][0]["device"] == "CPU"
    assert (tmp_path / "table-6" / "heat-map.png").exists()


def test_draws_without_measurements_and_from_elsewhere(tmp_path, monkeypatch):
    """Without matplotlib there is no plot; it is drawn later from what is stored."""
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
        )
        smoke("figure-1", tmp_path)
    assert not (tmp_path / "figure-1.png").exists()
    before = stored(tmp_path, "figure-1")
    smoke("figure-1", tmp_path, only_draw=True)
    assert stored(tmp_path, "figure-1") == before
    check_files(tmp_path, "figure-1")
    empty = tmp_path / "empty"
    assert len(run(ALL, preset="full", out=empty, only_draw=True).reports) == len(CATALOGUE)
    for name in CATALOGUE:
        _, page = check_files(empty, name)
        assert "Nothing is measured yet." in page
        assert "What the paper says" in page


@pytest.mark.usefixtures("no_plots")
def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no 'figure-2'; perhaps you meant 'figure-"):
        names_of("figure-2")
    with pytest.raises(ValueError, match="width is 0; it must be at least 1"):
        smoke("figure-1", tmp_path, width=0)
    with pytest.raises(ValueError, match="preset is 'tiny'; it must be one of 'full', 'smoke'"):
        run("figure-1", preset="tiny")
    with pytest.raises(RunError, match="measures on a CUDA GPU, and the device is cpu"):
        run("figure-1", device="cpu", out=tmp_path)
    smoke("figure-1", tmp_path)
    with pytest.raises(RunError, match="holds points of preset 'smoke', but now it is 'full'"):
        run("figure-1", preset="full", out=tmp_path, only_draw=True)
    facts = points.facts_of
    with monkeypatch.context() as patch:
        other = lambda *given: facts(*given) | {"device": "other"}  # noqa: E731
        patch.setattr("pararnn.reproduce.parts.facts_of", other)
        with pytest.raises(RunError, match="CPU, but this is other; choose another --out"):
            smoke("figure-1", tmp_path)
    (tmp_path / points.FILE).write_text("[")
    with pytest.raises(RunError, match="is damaged"):
        smoke("figure-1", tmp_path)


def test_trained_models_of_other_cells_are_refused(tmp_path):
    folder = tmp_path / "elman"
    folder.mkdir()
    (folder / "config.json").write_text(config_json(resolve(TrainConfig(model="elman"))))
    with pytest.raises(RunError, match="has trained elman; Figure 4 has paragru and paralstm"):
        smoke("figure-4", tmp_path / "new", runs=[folder])


@pytest.mark.usefixtures("no_plots")
def test_command(tmp_path, capsys):
    assert main(["reproduce", "figure-1", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    one = stored(tmp_path, "figure-1")["runs"][0]
    assert one["command"] == f"pararnn reproduce figure-1 --preset smoke --out {tmp_path}"
    assert main(["reproduce", "figure-1", "--out", str(tmp_path / "full"), "--device", "cpu"]) == 1
    assert "Take --preset smoke" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "figure-7"])
    assert stop.value.code == 2
    assert "there is no 'figure-7'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, entry in CATALOGUE.items():
        assert f"{name}: {entry.shows}; {entry.takes}." in printed


def test_names_agree():
    assert list(PARTS) == list(CATALOGUE)


def test_speed_needs_few_packages(tmp_path):
    """Figures 1, 5 and 6 are measured without packages of models and command lines."""
    script = f"""
import sys
for name in ("transformers", "tyro", "tensorboard", "safetensors", "matplotlib"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from pararnn.reproduce import run
run("figure-1", preset="smoke", device="cpu", out={str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No plot: matplotlib is not installed" in done.stdout


def test_quoted_numbers_agree_with_each_other():
    assert set(quoted.STEP_MS) == set(quoted.PARAMETERS)
    assert len(quoted.task_accuracy()) == 5 * 4


def test_markdown():
    """One origin for all is told once, others by column; bars in text do not end a cell."""
    table = Table("Things", (Column("a|b"), Column("ms", "measured", ".1f")), [("x|y", 1.25)])
    mixed = Table(
        "More", (Column("ms", "measured", ".1f"), Column("ms", "estimated", ".0f")), [(1.0, None)]
    )
    panel = Panel("p", "x", "y", [Line("l", "measured", [1.0], [2.0])])
    page = markdown(Report("n", "N", [table, mixed], [panel], [], ["note"]))
    assert "Things, measured:" in page
    assert "| x\\|y | 1.2 |" in page
    assert "| ms, measured | ms, estimated |" in page
    assert "| 1.0          |               |" in page
    assert "- note" in page
