"""Who works when, with lanes and models that do nothing but count."""

import contextlib
import gc
import types
import weakref

import pytest
import torch

from pararnn.tasks import side_by_side as module
from pararnn.tasks.settings import settings_for
from pararnn.tasks.side_by_side import Inline, side_by_side
from pararnn.tasks.training import AHEAD, Training, Unit, finish, train_unit

NAMES = "abcdef"


def units(count):
    return [Unit("parity", NAMES[i], 0) for i in range(count)]


class Device:
    """Finishes one piece of every lane at each rest; notes who runs when and beside whom."""

    def __init__(self, monkeypatch):
        self.lanes, self.log, self.most = [], [], 0
        monkeypatch.setattr(module.time, "sleep", self.rest)

    def rest(self, seconds):
        assert any(lane.queued for lane in self.lanes), "nothing would ever wake it up"
        for lane in self.lanes:
            lane.queued = max(0, lane.queued - 1)

    def make(self, count):
        self.lanes = [Lane(self) for _ in range(count)]
        return self.lanes


class Lane:
    def __init__(self, device):
        self.device, self.queued, self.deepest = device, 0, 0

    def run(self, pieces):
        allowed = next(pieces)
        self.queued += 1
        self.deepest = max(self.deepest, self.queued)
        busy = sum(lane.queued > 0 for lane in self.device.lanes)
        self.device.most = max(self.device.most, busy)
        return allowed

    def unfinished(self):
        return self.queued

    def clear(self):
        self.queued = 0


class Model:
    """Takes so many steps; fails at one where asked to."""

    def __init__(self, device, unit, steps, error=None):
        self.device, self.unit, self.steps, self.error = device, unit, steps, error

    def pieces(self):
        for step in range(self.steps):
            self.device.log.append((self.unit.architecture, step))
            if self.error is not None and step == self.steps // 2:
                raise self.error
            yield AHEAD
        yield 0
        return {"steps": self.steps}


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def never():
    return False


def outcomes(todo, start, lanes, should_stop=never):
    found = {}
    for unit, result, error in side_by_side(todo, start, lanes, should_stop):
        assert unit not in found
        found[unit] = result, error
    return found


@pytest.mark.parametrize(("count", "lanes"), [(5, 2), (3, 3), (2, 5), (1, 1), (0, 2)])
def test_all_are_trained_each_in_its_order(count, lanes, device):
    todo = units(count)
    steps = {unit: 30 + 10 * i for i, unit in enumerate(todo)}
    found = outcomes(todo, lambda u: Model(device, u, steps[u]).pieces(), device.make(lanes))
    assert found == {unit: ({"steps": steps[unit]}, None) for unit in todo}
    for unit in todo:
        assert [s for name, s in device.log if name == unit.architecture] == [*range(steps[unit])]
    assert device.most == min(count, lanes)
    assert all(lane.deepest <= AHEAD + 1 for lane in device.lanes)


def test_they_take_turns(device):
    """None is more than the pieces that may wait ahead of another of the same length."""
    done = dict.fromkeys(NAMES[:3], 0)
    for unit, *_ in side_by_side(
        units(3), lambda u: Model(device, u, 100).pieces(), device.make(3), never
    ):
        del unit
    for name, _ in device.log:
        done[name] += 1
        assert max(done.values()) - min(done.values()) <= AHEAD + 2


def test_results_are_read_when_all_is_done(device):
    """What yields 0 goes on only when nothing of it is on its way."""
    (lane,) = device.make(1)

    def pieces():
        for _ in range(5):
            yield AHEAD
        yield 0
        assert lane.queued == 0
        return {}

    assert outcomes(units(1), lambda u: pieces(), [lane]) == {units(1)[0]: ({}, None)}


def test_one_that_fails_leaves_the_others(device):
    def start(unit):
        error = ValueError("this is broken") if unit.architecture == "b" else None
        return Model(device, unit, 20, error).pieces()

    found = outcomes(units(4), start, device.make(2))
    assert found.pop(units(2)[1]) == (None, "ValueError: this is broken")
    assert found == {unit: ({"steps": 20}, None) for unit in units(4) if unit.architecture != "b"}


def test_without_memory_there_are_fewer(device, capsys):
    """The one that lacks it begins again when another has ended, and nothing of it is kept."""
    begun, held = [], []

    class Big:
        pass

    def start(unit):
        begun.append(unit.architecture)
        if unit.architecture != "c" or begun.count("c") > 1:
            return (yield from Model(device, unit, 20).pieces())
        big = Big()
        held.append(weakref.ref(big))
        yield AHEAD
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = outcomes(units(5), start, device.make(3))
    assert found == {unit: ({"steps": 20}, None) for unit in units(5)}
    assert begun == ["a", "b", "c", "c", "d", "e"]
    gc.collect()
    assert held[0]() is None
    said = capsys.readouterr().out
    assert "The GPU has no memory for 3 models at once. From now on at most 2" in said
    assert "parity-c-0 waits until another has ended" in said


def test_without_memory_for_one_it_fails(device):
    def start(unit):
        error = torch.OutOfMemoryError("CUDA out of memory") if unit.architecture == "a" else None
        return Model(device, unit, 4, error).pieces()

    found = outcomes(units(2), start, device.make(1))
    assert found[units(2)[0]] == (None, "OutOfMemoryError: CUDA out of memory")
    assert found[units(2)[1]] == ({"steps": 4}, None)


def test_a_stop_ends_all_and_begins_none(device):
    stopped = []

    def start(unit):
        for step in range(100):
            if stopped:
                return None
            if unit.architecture == "b" and step == 10:
                stopped.append(True)
            yield AHEAD
        return {}

    found = outcomes(units(4), start, device.make(2), lambda: bool(stopped))
    assert found == dict.fromkeys(units(2), (None, None))


def test_models_side_by_side_are_as_alone(device, tmp_path):
    """Real models whose pieces alternate, each to the bit as if it were alone."""
    settings = settings_for("parity", "smoke", {"steps": 30, "test_samples": 16})
    todo = [Unit("parity", name, seed) for name in ("paragru", "elman") for seed in (0, 1)]
    cpu = torch.device("cpu")
    kept = {}

    def start(unit):
        folder = tmp_path / "together" / str(unit)
        folder.mkdir(parents=True)
        kept[unit] = Training(unit, settings, folder, cpu)
        return kept[unit].pieces(never)

    found = outcomes(todo, start, device.make(3))
    for unit in todo:
        folder = tmp_path / "alone" / str(unit)
        folder.mkdir(parents=True)
        alone = Training(unit, settings, folder, cpu)
        expected = alone.run(never)
        result, error = found[unit]
        assert error is None
        for one in (result, expected):
            one.pop("train_seconds"), one.pop("test_seconds")
        assert result == expected
        for name, value in alone.model.state_dict().items():
            assert torch.equal(kept[unit].model.state_dict()[name], value), name


def test_inline():
    """On a CPU a piece is finished when it returns."""
    assert outcomes(units(2), lambda u: iter(()), [Inline()]) == dict.fromkeys(
        units(2), (None, None)
    )


def test_a_result_that_is_there_is_read(tmp_path):
    unit, settings = Unit("parity", "elman", 0), settings_for("parity", "smoke", {"steps": 3})
    cpu = torch.device("cpu")
    result = finish(train_unit(unit, settings, tmp_path, cpu, never))
    found = outcomes([unit], lambda u: train_unit(u, settings, tmp_path, cpu, never), [Inline()])
    assert found == {unit: (result, None)}


def test_a_stream(monkeypatch):
    """Pieces run while its stream is current; each is finished when its event is."""
    current, done = [], set()

    class Event:
        made = 0

        def __init__(self):
            self.number = Event.made
            Event.made += 1

        def record(self, recorded):
            assert recorded is stream

        def query(self):
            return self.number in done

    @contextlib.contextmanager
    def use(stream):
        current.append(stream)
        yield
        current.pop()

    synchronized = []
    stream = types.SimpleNamespace(synchronize=lambda: synchronized.append(True))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(module, "_stream", lambda device, number: stream)

    def pieces():
        for allowed in (3, 2, 1):
            assert current == [stream]
            yield allowed

    lane, work = module.Stream(torch.device("cuda", 0), 0), pieces()
    assert [lane.run(work) for _ in range(3)] == [3, 2, 1]
    assert current == []
    assert lane.unfinished() == 3
    done.update({0, 1})
    assert lane.unfinished() == 1
    with pytest.raises(StopIteration):
        lane.run(work)
    assert lane.unfinished() == 1
    lane.clear()
    assert synchronized == [True]
    assert lane.unfinished() == 0
