"""Who a process is; what it says when that cannot be."""

import pytest
import torch

from pararnn.lm.training import RunError
from pararnn.lm.training.parallel import choose_device, join_processes, train_command


def join(device="cpu"):
    with join_processes(device) as processes:
        return processes


def test_alone_nothing_of_distributed_is_used():
    processes = join()
    assert (processes.rank, processes.count, processes.saving) == (0, 1, None)
    assert processes.device == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert processes.mean([2.0, 3.0]) == [2.0, 3.0]
    assert processes.largest(3) == 3
    with pytest.raises(RunError, match="as it was"):
        processes.on_first(lambda: (_ for _ in ()).throw(RunError("as it was")))


@pytest.fixture
def second_of_two(monkeypatch):
    told = {"RANK": 1, "LOCAL_RANK": 1, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
    told |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


def test_the_command_to_go_on(second_of_two, monkeypatch):
    assert train_command() == "torchrun --nproc-per-node 2 -m pararnn.cli train"
    monkeypatch.delenv("WORLD_SIZE")
    assert train_command() == "pararnn train"


def test_one_numbered_device_for_all_is_refused(second_of_two):
    with pytest.raises(RunError, match=r"cpu:0 would be used by every process; .* --device cpu"):
        join("cpu:0")


def test_a_process_without_a_gpu_is_told(second_of_two, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(RunError, match="process 1 of this machine has no GPU: PyTorch sees 1"):
        join("cuda")


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RunError, match=r"WORLD_SIZE is 2 but these are not set: RANK, .*torchrun"):
        join()


def test_a_device_that_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RunError, match="'cuda' cannot be used: PyTorch sees no GPU"):
        join("cuda")
    with pytest.raises(RunError, match="'gpu' is not one of PyTorch's; use cpu or cuda"):
        join("gpu")
    for name in ("meta", "vulkan", "privateuseone"):
        with pytest.raises(RunError, match=rf"device '{name}' cannot be used: .* Use cpu or cuda"):
            join(name)
    assert join("auto").device.type == "cpu"


@pytest.mark.parametrize("name", ["cuda:2", "cuda:7", "cuda:256"])
def test_a_gpu_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(RunError, match=rf"'{name}' cannot be used: PyTorch sees cuda:0, cuda:1\."):
        choose_device(name)
    assert [str(choose_device(f"cuda:{number}")) for number in (0, 1)] == ["cuda:0", "cuda:1"]
