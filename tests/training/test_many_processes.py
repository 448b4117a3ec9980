"""Runs of several processes: equal to one process, killed, stopped, resumed by other numbers."""

import dataclasses
import json
import random
import shutil
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from pararnn.lm.training import RunFolder, train
from pararnn.lm.training.config import TextConfig
from pararnn.lm.training.language_model import build_model
from pararnn.lm.training.optimizer import build_optimizer, named_state
from pararnn.lm.training.text import Codec

from .launch import HERE, SETTINGS, Launch, curve, needs_proc, records, trainings, with_text

pytestmark = needs_proc

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def launch(folder):
    with trainings(folder) as start:
        yield start


def start_new(launch, name, num_processes=2, **options):
    arguments = ("--text.batch-size", "2", "--steps", str(STEPS), "--out", name)
    return launch(num_processes, *SETTINGS, *arguments, **options)


@pytest.fixture(scope="module")
def whole(folder, launch):
    """An uninterrupted run of two processes, started as a user starts it; what it printed."""
    printed = start_new(launch, "whole", torchrun=True).wait()
    return folder / "whole", printed


def test_the_first_process_speaks_for_all(whole):
    run, printed = whole
    for part in ("in parts on 2 processes", "Validation: ", "Plot: ", "Sample:\n"):
        assert printed.count(part) == 1
    assert "run step by step" not in printed
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    assert len((run / "validation.jsonl").read_text().splitlines()) == 1
    files = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())["files"]
    assert {"state/__0_0.distcp", "state/__1_0.distcp", "model.safetensors"} <= set(files)
    assert "processes: 2" in (run / "env.txt").read_text()


def one_process(folder, name, **changes):
    """The settings of `whole` for this process: the same sequences per step in two passes."""
    config = RunFolder.open(folder / "whole").read_config()
    return dataclasses.replace(config, out=folder / name, **changes)


def assert_close_curves(run, expected, steps, rel=2e-4):
    for found, wanted in zip(curve(run)[:steps], curve(expected)[:steps], strict=True):
        assert found == pytest.approx(wanted, rel=rel), wanted["step"]


def test_one_process_has_the_same_losses_and_two_can_go_on(folder, whole, launch):
    run, _ = whole
    train(one_process(folder, "one", steps=10))
    assert len(curve(folder / "one")) == 10
    assert_close_curves(folder / "one", run, 10)
    printed = launch(2, "--resume", "--out", "one", "--steps", "20").wait()
    assert "Resumed at step 10 from one/checkpoints/step-00000010" in printed
    assert_close_curves(folder / "one", run, 20)


def test_what_else_goes_on_in_parts(folder, whole, launch):
    """The carried state, Muon, the mean of the weights and its validations: two as one, and on."""
    changes = "--text.carry-state --optimizer.algorithm muon --optimizer.average-decay 0.9".split()
    changes += ["--validate-every", "2", "--text.batch-size", "2"]
    launch(2, *SETTINGS, *changes, "--steps", "6", "--out", "parts").wait()
    config = RunFolder.open(folder / "parts").read_config()
    train(dataclasses.replace(config, out=folder / "alone", steps=4))
    printed = launch(2, "--resume", "--out", "alone", "--steps", "6").wait()
    assert "Resumed at step 4" in printed
    assert len(curve(folder / "alone")) == 6
    # Muon computes in bfloat16
    assert_close_curves(folder / "alone", folder / "parts", 6, rel=3e-3)
    found, expected = (
        [json.loads(line) for line in (folder / name / "validation.jsonl").read_text().splitlines()]
        for name in ("alone", "parts")
    )
    assert [record["step"] for record in found] == [2, 4, 6]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["num_tokens"] == other["num_tokens"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_from_two_processes_to_one(folder, whole, capsys):
    """All parts are read back to the bit, and training continues the curve."""
    run, _ = whole
    shutil.copytree(run, folder / "fewer")
    for path in sorted((folder / "fewer/checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    checkpoint = next((folder / "fewer/checkpoints").iterdir())
    config = one_process(folder, "fewer", text=TextConfig(), seed=1)
    model = build_model(config, Codec())
    optimizer = build_optimizer(model, config.optimizer)
    state = {"model": model.state_dict(), "optimizer": named_state(model, optimizer)}
    dcp.load(state, checkpoint_id=checkpoint / "state")
    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name
        assert optimizer.state[parameter]["step"] == STEPS - 5
        assert optimizer.state[parameter]["exp_avg_sq"].abs().sum() > 0, name
    train(one_process(folder, "fewer"), resume=True)
    assert f"Resumed at step {STEPS - 5}" in capsys.readouterr().out
    assert_close_curves(folder / "fewer", run, STEPS)


@pytest.mark.timeout(280)
def test_killed_stopped_and_resumed_processes_have_the_same_curve(folder, whole, launch):
    run, _ = whole
    killed = start_new(launch, "killed", script="slow_to_close.py")
    killed.wait_for_step("killed", random.randrange(6, STEPS - 20))
    killed.send(1, signal.SIGKILL)
    printed = killed.wait(succeeds=False)
    assert "lost the connection to another process" in printed
    lost = len(curve(folder / "killed"))

    stopped = launch(2, "--resume", "--out", "killed", script="slow_to_close.py")
    stopped.wait_for_step("killed", min(lost + 6, STEPS - 8))
    stopped.send(1, signal.SIGTERM)
    stopped.send(1, signal.SIGTERM)  # as a terminal, torchrun and what runs it may all do
    printed = stopped.wait()
    assert "SIGTERM at step" in printed
    assert "Traceback" not in printed
    assert (
        "checkpoint saved. Continue with: torchrun --nproc-per-node 2 -m pararnn.cli train"
        in printed
    )
    last = max(path.name for path in (folder / "killed/checkpoints").iterdir())
    assert last == f"step-{len(curve(folder / 'killed')):08d}"

    printed = launch(2, "--resume", "--out", "killed").wait()
    assert f"from killed/checkpoints/{last}" in printed
    assert curve(folder / "killed") == curve(run)
    newest = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    assert (folder / "killed" / newest).read_bytes() == (run / newest).read_bytes()


@pytest.mark.timeout(150)
def test_a_kill_inside_a_checkpoint_is_told_by_all_others_at_once(folder, launch):
    printed = start_new(launch, "saving", 4, script="killed_while_saving.py").wait(succeeds=False)
    assert printed.count("lost the connection to another process") == 3
    assert "cannot save" not in printed
    checkpoints = [path.name for path in (folder / "saving/checkpoints").glob("step-*")]
    assert checkpoints == ["step-00000000"]


def test_every_architecture_in_parts(folder):
    with Launch(2, HERE / "sharded_steps.py", folder=folder) as launched:
        printed = launched.wait()
    assert "all equal" in printed


def test_train_benchmark_in_parts(folder):
    sizes = "--width 16 --layers 2 --vocab-size 256 --batch-size 2 --sequence-length 16".split()
    command = ["bench", "train", "--device", "cpu", "--architectures", "paragru", "--out", "table"]
    with Launch(2, "-m", "pararnn.cli", *command, *sizes, folder=folder) as launched:
        printed = launched.wait()
    assert printed.count("train architecture=paragru") == 1
    (row,) = json.loads((folder / "table/train.json").read_text())["rows"]
    assert (row["processes"], row["batch"]) == (2, 2)
    assert row["tokens_per_second"] == pytest.approx(2 * 2 * 16 / row["step_ms"] * 1e3)
    assert "on 2 processes with a " in (folder / "table/train.md").read_text()
