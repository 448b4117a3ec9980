"""Measurements sent to services, which are pretended here."""

import json
import sys
import types

import pytest

from pararnn.lm.training import RunError, report, train


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


class Service(types.ModuleType):
    """A package whose functions note how they are called."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.calls = []

    def __getattr__(self, function):
        if function.startswith("__"):
            raise AttributeError(function)
        return lambda *args, **options: self.calls.append((function, args, options))


@pytest.fixture(params=["wandb", "trackio", "mlflow"])
def service(request, monkeypatch):
    module = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_every_step_and_validation_is_sent(make_config, service):
    config = make_config(steps=4, validate_every=2, log=service.__name__)
    train(config)
    names = [name for name, *_ in service.calls]
    starts = {"mlflow": ["set_experiment", "start_run", "log_params"]}
    assert names[: names.index(names[-2])] == starts.get(service.__name__, ["init"])
    assert names[-1] == ("end_run" if service.__name__ == "mlflow" else "finish")
    sent = [(args[0], options["step"]) for _, args, options in service.calls if "step" in options]
    assert [step for _, step in sent] == [1, 2, 2, 3, 4]
    records = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    losses = [values["train/loss"] for values, _ in sent if "train/loss" in values]
    assert losses == [record["loss"] for record in records]
    assert "validation/bits_per_byte" in sent[2][0]
    told = json.dumps(service.calls, default=str)
    assert '"optimizer.learning_rate": 0.01' in told
    assert '"run"' in told


def test_a_service_that_does_not_start(make_config, service):
    def fail(*args, **options):
        raise KeyError("no such server")

    service.init = service.start_run = fail
    with pytest.raises(RunError, match=r"cannot start: 'no such server'. Put .* --log none"):
        train(make_config(log=service.__name__))


def test_a_service_that_is_not_installed(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match="--log wandb needs the package wandb: pip install wandb"):
        train(make_config(log="wandb"))
