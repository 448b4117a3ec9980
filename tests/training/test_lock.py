"""One process at a time in a run folder, starts that failed, threads."""

import os
import re
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from forks import Fork

from pararnn.cli.main import main
from pararnn.layers.runner import BackendError
from pararnn.lm.training import RunError, lock, report, runs, train, trainer
from pararnn.lm.training.config import ScheduleConfig
from pararnn.lm.training.lock import alone_in_run


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


needs_flock = pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")


@needs_flock
def test_a_folder_in_use_is_named_with_its_process(tmp_path, capsys, make_config):
    config = make_config(steps=1)
    train(config)
    capsys.readouterr()
    with alone_in_run(config.out):
        assert main(["train", "--resume", "--out", str(config.out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        holder = rf"in use by process {os.getpid()} on \S+ \(started \d{{4}}-\S+ \S+\); wait for it"
        assert re.search(holder, line)
        with pytest.raises(RunError, match=r"already holds a run|in use by process"):
            train(config)
    train(config, resume=True)


@needs_flock
def test_a_new_folder_is_for_the_first_that_comes(make_config, monkeypatch):
    config = make_config(steps=1)
    begun, go_on = threading.Event(), threading.Event()
    find = runs.open_text

    def wait(*arguments):
        begun.set()
        go_on.wait(60)
        return find(*arguments)

    monkeypatch.setattr(runs, "open_text", wait)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(train, config)
        begun.wait(60)
        with pytest.raises(RunError, match="in use by process"):
            train(config)
        go_on.set()
        assert first.result().step == 1


def die(folder):
    with alone_in_run(folder):
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


@needs_flock
def test_a_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path):
    with Fork(die, tmp_path, folder=tmp_path) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    with alone_in_run(tmp_path):
        pass


def test_a_system_without_locks_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "fcntl", None)
    with alone_in_run(tmp_path), alone_in_run(tmp_path):
        pass
    assert "Note: no lock on" in capsys.readouterr().out


def fail(*arguments):
    raise MemoryError("too much")


def test_a_failed_start_leaves_nothing(make_config, monkeypatch):
    config = make_config(steps=1)
    config.out.mkdir()
    (config.out / ".keep").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "outline_model", fail)
        with pytest.raises(RunError, match=r"out of memory: too much. Lower --text.batch-size"):
            train(config)
    assert [path.name for path in config.out.iterdir()] == [".keep"]
    assert train(config).step == 1


def test_a_backend_that_cannot_do_it_is_a_message(make_config, monkeypatch):
    def refuse(*arguments):
        raise BackendError("backend='triton' cannot run it here. Use backend='torch'.")

    monkeypatch.setattr(runs, "lay_out", refuse)
    config = make_config(steps=1)
    with pytest.raises(RunError, match="cannot run it here"):
        train(config)
    assert not config.out.exists()


@pytest.mark.parametrize("changes", [{}, {"seed": 1, "schedule": ScheduleConfig(length=7)}])
def test_a_start_killed_before_its_first_checkpoint_can_be_given_again(
    make_config, monkeypatch, changes
):
    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(steps=2))
    config = make_config(steps=2, **changes)
    assert (config.out / "config.json").exists()
    assert train(config).step == 2
    with pytest.raises(RunError, match="already holds a run"):
        train(config)


def test_folders_of_others_are_left_alone(make_config):
    config = make_config(steps=1)
    (config.out / "data").mkdir(parents=True)
    (config.out / "config.json").write_text('{"mine": true}')
    (config.out / "data/thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"config.json cannot be read"):
        train(config)
    assert (config.out / "data/thesis.txt").read_text() == "mine"
    assert (config.out / "config.json").read_text() == '{"mine": true}'


def test_training_in_a_thread_leaves_signals_and_warnings_as_they_were(make_config):
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(train, make_config(steps=2)).result().step == 2
    assert warnings.filters == before


def test_the_command_to_go_on_is_quoted(make_config, capsys):
    config = make_config("my run's", steps=1)
    train(config)
    (config.out / "checkpoints/step-00000000/model.safetensors").unlink()
    (config.out / "checkpoints/step-00000001/model.safetensors").unlink()
    assert main(["train", "--resume", "--out", str(config.out)]) == 1
    assert f"""--out '{config.out.parent}/my run'"'"'s'""" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_refused(make_config):
    config = make_config(steps=1)
    with pytest.raises(RunError, match=r"is not UTF-8; name another folder"):
        train(make_config("run\udcff", steps=1))
    assert not config.out.exists()
