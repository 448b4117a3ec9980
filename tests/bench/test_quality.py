"""benchmarks/quality.py at toy size."""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pararnn.lm.catalogue import MEMORIES, check_architecture, parts
from pararnn.lm.training import RunFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks/quality.py"
TINY = """--steps 3 --batch-size 2 --sequence-length 32 --width 32 --layers 2
--validation-tokens 300 --device cpu""".split()
LINEAR = "m2rnn:nonlinearity=linear,value_size=8"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Ended:
    """A process that has run."""

    def __init__(self, returncode):
        self.returncode = returncode

    def poll(self):
        return self.returncode


@pytest.fixture
def inline(quality, monkeypatch, capsys):
    """`main` in this process, without others."""
    start = lambda self, unit: Ended(quality.run_unit(unit, self.options))  # noqa: E731
    monkeypatch.setattr(quality.Workers, "_start", start)
    monkeypatch.setattr(quality.signal, "signal", lambda *_: None)

    def call(*arguments):
        assert quality.main(list(arguments)) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(6):
        words = random.Random(number).choices(["state", "step", "cell", "of", "the"], k=300)
        (tmp_path / f"text/{number}.txt").write_text(" ".join(words))
    return [*TINY, "--text", f"words={tmp_path / 'text'}", "--out", str(tmp_path / "out")]


def test_a_search(tmp_path, arguments, quality, inline):
    """Two models on the same bytes, a second seed of each; nothing is trained twice; then times."""
    chosen = ["--models", "transformer", LINEAR, "--rates", "0.003"]
    inline(*arguments, *chosen, "--processes", "2")
    rows = json.loads((tmp_path / "out/results.json").read_text())
    models = ("transformer", LINEAR)  # each is the best of its kind
    assert {(r["model"], r["seed"]) for r in rows} == {(m, seed) for m in models for seed in (0, 1)}
    runs = [RunFolder.open(path.parent) for path in tmp_path.glob("out/runs/*/*/result.json")]
    assert len({run.read_config().data for run in runs}) == 1
    assert len({json.dumps(vars(run.read_config().text), default=str) for run in runs}) == 1
    memory = next(r for r in rows if r["model"] == LINEAR)
    assert memory["state"] == 2 * 4 * 64 * 8
    assert memory["carried"] not in (None, memory["bits"])  # the Transformer has no such state
    transformer = next(r for r in rows if r["model"] == "transformer")
    assert transformer["state"] == 2 * 2 * 32 * 32
    assert transformer["carried"] is None
    again = inline(*arguments, *chosen)
    assert "bits per byte held out" not in again.partition("| text")[0]
    inline(*arguments, *chosen, "--times")
    table = (tmp_path / "out/table.md").read_text()
    assert f"| words | transformer | {transformer['parameters']:,} | 4,096 | 0.003 | 2 | " in table
    assert table.count(f"| words | {LINEAR} | ") == 1 + 2
    assert (tmp_path / "out/curves.png").stat().st_size > 1000
    options = type("Options", (), {**memory["settings"], "steps": 4, "out": tmp_path / "out"})
    with pytest.raises(SystemExit, match=r"holds results of {'steps': 3}; take another --out"):
        quality.check_same(options)


def test_the_time_is_over(tmp_path, arguments, inline):
    chosen = [
        "--models",
        "paragru",
        "elman",
        "--rates",
        "0.003",
        "--seeds",
        "1",
        "--processes",
        "1",
    ]
    stopped = inline(*arguments, *chosen, "--minutes", "1e-9")
    assert "Stopped; the same command goes on." in stopped
    assert len(list(tmp_path.glob("out/runs/*/*/result.json"))) == 1
    assert "elman 0.003 seed 0: " in inline(*arguments, *chosen)
    assert len(list(tmp_path.glob("out/runs/*/*/result.json"))) == 2


def test_stopped_by_a_signal(tmp_path, arguments):
    """Processes write checkpoints; the status names the signal, also where a model has failed."""
    command = [sys.executable, str(SCRIPT), *arguments, "--rates", "0.003", "--processes", "2"]
    command += ["--models", "elman", "paragru", "--steps", "100000"]
    folder = tmp_path / "out/runs/words"
    (folder / "elman-0.003-0").mkdir(parents=True)
    (folder / "elman-0.003-0/config.json").write_text("damaged")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = next(line for line in process.stdout if " failed: " in line)
    assert "elman 0.003 seed 0 failed: " in first
    assert "config.json cannot be read" in first
    metrics = folder / "paragru-0.003-0/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.2)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "paragru 0.003 seed 0: stopped" in output
    assert "not finished: words paragru-0.003-0: " in output
    newest = max(path.name for path in folder.glob("paragru-0.003-0/checkpoints/step-*"))
    assert int(newest.removeprefix("step-")) > 0


def test_stopped_while_the_text_is_prepared(arguments, quality, monkeypatch, capsys):
    monkeypatch.setattr(quality, "prepare", lambda *_, **__: signal.SIGINT)
    assert quality.main([*arguments, "--models", "paragru"]) == 128 + signal.SIGINT
    assert "Stopped; the same command goes on." in capsys.readouterr().out


def test_the_whole_search(quality):
    models = quality.all_models(7)
    assert len(models) == len(set(models)) > 25
    for model in models:
        check_architecture(model.partition(":")[0])
    assert quality.stack("m2rnn", 1, 7) == "3xparagru+m2rnn+3xparagru"
    for name in MEMORIES:
        stacks = [parts(model.partition(":")[0]) for model in models if "+" in model]
        counts = [stack.count(name) for stack in stacks]
        assert {1, 2, 3} <= set(counts)
    assert "m2rnn:nonlinearity=linear" in models
    assert "m2rnn+delta:key_size=128" in models
    assert "gated-deltanet:nonlinearity=tanh" in models
    assert "3xdelta+attention+3xdelta" in models


def test_seeds_of_what_is_close(quality):
    options = type("Options", (), {})()
    options.texts, options.seeds, options.close = [("code", "")], 3, 0.01
    options.models = ["a", "b", "c", "transformer", "attention+a"]
    bits = {"a": 1.0, "b": 1.005, "c": 1.02, "transformer": 0.8, "attention+a": 0.9}
    rows = [
        {"text": "code", "model": model, "rate": rate, "seed": 0, "bits": value + rate}
        for model, value in bits.items()
        for rate in (0.001, 0.002)
    ]
    more = quality.close_units(options, rows)
    assert {(u.model, u.rate, u.seed) for u in more} == {
        (model, 0.001, seed) for model in ("a", "b", "transformer") for seed in (1, 2)
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--models", "m2rnn:keysize=8"], "--models m2rnn:keysize=8: memory 'm2rnn' does not take"),
        (["--models", "m2rnn:key_size=abc"], "key_size must be a whole number, got 'abc'"),
        (["--models", "m2rnn:key_size"], "memory_options is key_size; it must be NAME=VALUE"),
        (["--models", "m2rnn:"], "memory_options is ; it must be NAME=VALUE"),
        (["--models", "paragru:key_size=8"], "key_size=8, but no block of paragru has a memory"),
        (["--models", "m2rn"], "--models m2rn: there is no architecture 'm2rn'; perhaps you meant"),
        (["--models", "cell.py:Mine"], "--models cell.py:Mine: a cell in a file cannot be"),
        (["--models", "paragru", "--text", "folder"], "--text folder: give code, or a name and a"),
        (["--models", "paragru", "--text", "a/b=folder"], "--text a/b=folder: give code"),
    ],
)
def test_mistakes_are_told_at_once(quality, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit) as raised:
        quality.main([*TINY, *given, "--out", str(tmp_path / "out")])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_that_there_is_not(quality, tmp_path):
    given = [*TINY, "--models", "paragru", "--text", "words=nowhere", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^--text words=nowhere: there is no file or folder"):
        quality.main(given)


@pytest.mark.parametrize(("bits", "top"), [(1.5, 2.0), (7.0, None)])
def test_curves_are_within_the_picture(quality, tmp_path, monkeypatch, bits, top):
    """The rest of a search is cut off above, but not if nothing would be left."""
    from matplotlib.figure import Figure

    run = tmp_path / "runs/words/paragru"
    run.mkdir(parents=True)
    lines = [{"step": i, "bits_per_byte": bits - i / 1000} for i in range(1, 101)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    sizes = {"batch_size": 2, "sequence_length": 8}
    quality.plot_curves(type("Options", (), {"out": tmp_path, **sizes}))
    low, high = drawn[0].axes[0].get_ylim()
    assert low < bits - 0.05 < high
    assert top is None or high == top


@pytest.mark.parametrize(
    ("device", "verb"), [("cpu", "takes"), ("cuda", "is not trained, since it would take")]
)
def test_a_baseline_without_its_kernels(quality, tmp_path, monkeypatch, device, verb):
    monkeypatch.setattr(quality, "missing_kernels", lambda name: "a slow path")
    monkeypatch.setattr(quality, "choose_device", torch.device)
    options = type("Options", (), {"out": tmp_path, "models": ["mamba2"], "device": device})
    assert quality.tables(options, {}).endswith(f"\nmamba2 {verb} a slow path")
