"""Training on two GPUs (NCCL), started as a user starts it."""

import json
import signal

import pytest
import torch
from training.launch import HERE, SETTINGS, Launch, curve, needs_proc, trainings, with_text

pytestmark = [
    pytest.mark.gpu,
    # With gloo the same is tested without GPUs, in training/test_many_processes.py.
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins GPUs: needs two of them"),
    needs_proc,
]

STEPS = 40
ON_GPUS = ["cuda" if word == "cpu" else word for word in SETTINGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("gpus"))


@pytest.fixture(scope="module")
def launch(folder):
    with trainings(folder, torchrun=True) as start:
        yield start


def start_new(launch, name):
    sizes = ["--text.batch-size", "2", "--steps", str(STEPS)]
    return launch(2, *ON_GPUS, *sizes, "--out", name)


@pytest.fixture(scope="module")
def whole(folder, launch):
    """An uninterrupted run on two GPUs."""
    printed = start_new(launch, "whole").wait()
    assert "in parts on 2 processes" in printed
    return folder / "whole"


def test_a_killed_process_and_a_resumed_run_have_the_same_curve(folder, whole, launch):
    """Checkpoints are copied from the GPUs and written while training goes on."""
    killed = start_new(launch, "killed")
    killed.wait_for_step("killed", 17)
    killed.send(1, signal.SIGKILL)
    killed.wait(succeeds=False)
    assert len(curve(folder / "killed")) < STEPS
    printed = launch(2, "--resume", "--out", "killed").wait()
    assert "Resumed at step " in printed
    assert curve(folder / "killed") == curve(whole)
    newest = f"checkpoints/step-{STEPS:08d}"
    parts = [f"{newest}/state/__{rank}_0.distcp" for rank in range(2)]
    assert all((folder / "killed" / part).stat().st_size > 0 for part in parts)
    model = f"{newest}/model.safetensors"
    assert (folder / "killed" / model).read_bytes() == (whole / model).read_bytes()


def test_two_gpus_go_on_as_one(folder, whole, launch):
    """A checkpoint of two processes is continued by one, which has the same losses."""
    ended = launch(2, *ON_GPUS, "--text.batch-size", "2", "--steps", "20", "--out", "fewer")
    ended.wait()
    more = ("--steps", str(STEPS), "--text.batch-size", "4")
    printed = launch(1, "--resume", "--out", "fewer", *more).wait()
    assert "Resumed at step 20" in printed
    assert "processes: 1" in (folder / "fewer/env.txt").read_text()
    for found, wanted in zip(curve(folder / "fewer"), curve(whole), strict=True):
        assert found == pytest.approx(wanted, rel=1e-3), wanted["step"]


def test_a_signal_to_one_saves_and_stops_all(folder, whole, launch):
    stopped = start_new(launch, "stopped")
    stopped.wait_for_step("stopped", 12)
    stopped.send(1, signal.SIGTERM)
    printed = stopped.wait()
    assert "SIGTERM at step" in printed
    assert "Traceback" not in printed
    launch(2, "--resume", "--out", "stopped").wait()
    assert curve(folder / "stopped") == curve(whole)


def test_every_architecture_in_parts(folder):
    """Equal to whole models, compiled too, from the first values on."""
    with Launch(2, HERE / "sharded_steps.py", "cuda", folder=folder, torchrun=True) as launched:
        printed = launched.wait(240)
    assert "all equal" in printed


def test_train_benchmark(folder):
    sizes = "--width 64 --layers 2 --vocab-size 256 --batch-size 2 --sequence-length 64".split()
    models = ["--architectures", "paragru", "transformer", "--out", "table"]
    command = ["-m", "pararnn.cli", "bench", "train", *sizes, *models]
    with Launch(2, *command, folder=folder, torchrun=True) as launched:
        printed = launched.wait(240)
    assert printed.count("train architecture=") == 2
    rows = json.loads((folder / "table/train.json").read_text())["rows"]
    assert [row["processes"] for row in rows] == [2, 2]
    assert "skipped" not in rows[0]
    assert rows[0]["note"] == ""
