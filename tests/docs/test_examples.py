"""The examples run; in a short form where their own takes long, on data that the tests make."""

import math
import random
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import nn

from pararnn.testing import assert_close

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "own_cell.py": (["--steps", "2"], "accuracy"),
    "drop_in.py": (["--steps", "1"], r"(?s)Parallelized, logits differ by (0|\de-0[5-9]).*ParaGRU"),
    "long_waveforms.py": (["--steps", "1"], "(?s)accuracy 0.*the recurrence alone: ParaGRU"),
    "not_converging.py": (
        ["--time", "110"],
        r"(?s)converged.*exponent \+0.\d+ before, -0.\d+ after",
    ),
    "functional.py": (["--time", "50"], "step 100: mean rate"),
    "long_audio.py": (
        ["--steps", "2", "--samples", "1000"],
        "(?s)accuracy 0.*the recurrence alone",
    ),
    "irregular_times.py": (
        ["--steps", "2"],
        r"(?s)error: \d\S+e-1[4-6].*GRU-D .*\nnn.GRU .*always",
    ),
    "variable_lengths.py": (["--seconds", "0.01", "--layers", "nn.GRU"], r"nn.GRU .*test 0"),
    "recurrent_ppo.py": (["--updates", "1"], r"update 1: -\d\.\d{3} per maze"),
    "ensemble.py": (["--steps", "2"], r"a step of all 16: (?s:.*)squared error: 0"),
    "music.py": (["--seconds", "0.01"], r"(?s)ParaGRU .*test \d+\.\d{3} .*\nnn.GRU .*test \d"),
    "digits.py": (["--seconds", "0.01"], r"(?s)pixels ParaGRU .*test 0.*rows   nn.GRU .*test 0"),
    "characters.py": (["--seconds", "0.01"], r"(?s)ParaGRU .*test \d\.\d{3} .*\nnn.GRU .*test \d"),
}


def make_music(path):
    rng = np.random.default_rng(0)
    splits = {}
    for split in ("train", "valid", "test"):
        pieces = splits[f"{split}data"] = np.empty((1, 18), dtype=object)
        for i in range(18):
            pieces[0, i] = (rng.random((4 + i, 88)) < 0.05).astype(np.uint8)
    savemat(path, splits)


def make_text(path):
    path.write_text("".join(random.Random(0).choices("abcdé \n", k=4000)), encoding="utf-8")


MAKE = {"music.py": make_music, "characters.py": make_text}


def test_every_example_is_run():
    assert {p.name for p in EXAMPLES.glob("[!_]*.py")} == SHORT.keys()


@pytest.fixture
def example(monkeypatch):
    """The names that an example defines, or what it does as a program."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name, as_name="example": runpy.run_path(str(EXAMPLES / name), run_name=as_name)


@pytest.mark.parametrize("name", SHORT)
def test_example(name, example, monkeypatch, capsys, tmp_path):
    arguments, expected = SHORT[name]
    if name in MAKE:
        MAKE[name](tmp_path / "data")
        arguments = [*arguments, "--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    example(name, "__main__")
    assert re.search(expected, capsys.readouterr().out)


class Constant(nn.Module):
    """The same logits at every step."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits.expand(*x.shape[:2], -1)


def test_nats_per_frame_are_those_of_all_frames_but_the_first_of_each_piece(example, tmp_path):
    make_music(tmp_path / "data.mat")
    music = example("music.py")
    pieces = music["read"](str(tmp_path / "data.mat"))["test"]
    on = torch.rand(88, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = torch.cat([piece[1:] for piece in pieces]).double()
    expected = -(frames * on.log() + (1 - frames) * (1 - on).log()).sum(-1).mean().item()
    model = Constant(torch.logit(on).float())
    assert music["score"](model, pieces) == pytest.approx(expected, rel=1e-5)


def test_bits_per_character_of_a_guess_are_the_logarithm_of_the_number_of_symbols(
    example, tmp_path
):
    make_text(tmp_path / "data")
    characters = example("characters.py")
    data, symbols = characters["read"]([str(tmp_path / "data")])
    assert symbols == 7
    assert [len(data[split]) for split in ("train", "valid", "test")] == [3600, 200, 200]
    guess = characters["bits_per_character"](Constant(torch.zeros(7)), data["test"])
    assert guess == pytest.approx(math.log2(7), rel=1e-5)


def test_digits_are_read_in_the_order_of_the_pixels(example):
    digits = example("digits.py")
    pixels, rows = digits["read"](64, 1), digits["read"](8, 8)
    assert [len(pixels[split][0]) for split in ("train", "valid", "test")] == [1078, 359, 360]
    for split, (x, y) in pixels.items():
        assert torch.equal(x.flatten(1), rows[split][0].flatten(1))
        assert torch.equal(y, rows[split][1])


def test_memory_in_the_maze_pays(example, monkeypatch, capsys):
    """Nearly all that can be earned in short corridors, and nothing without the memory."""
    ppo = example("recurrent_ppo.py")
    scope = ppo["main"].__globals__
    monkeypatch.setitem(scope, "SHORTEST", 3)
    monkeypatch.setitem(scope, "LONGEST", 6)
    monkeypatch.setitem(scope, "STEPS", 32)
    found = []
    for options in ([], ["--forgets"]):
        monkeypatch.setattr(sys, "argv", ["recurrent_ppo.py", "--updates", "40", *options])
        ppo["main"]()
        last = capsys.readouterr().out.splitlines()[-1]
        found.append(float(re.search(r"update 40: (\S+) per maze", last)[1]))
    assert found[0] > 0.9
    assert found[1] < 0.3


def test_the_best_way_through_a_maze_pays_one(example):
    torch.manual_seed(0)
    ppo = example("recurrent_ppo.py")
    mazes = ppo["Mazes"]()
    signs, total, ended = mazes.look(), torch.zeros(ppo["MAZES"]), torch.zeros(ppo["MAZES"]) > 0
    assert set(map(int, signs.argmax(-1))) == {0, 1}
    for _ in range(ppo["LONGEST"] + 1):
        seen = mazes.look().argmax(-1)
        action = torch.where(seen == 3, 1 + signs.argmax(-1), 0)
        reward, ends = mazes.act(action)
        total += torch.where(ended, 0.0, reward)
        ended |= ends
    assert ended.all()
    assert total.eq(1).all()


def test_advantages_are_sums_of_discounted_surprises(example):
    ppo = example("recurrent_ppo.py")
    reward, value = torch.randn(3, 9).double(), torch.randn(3, 10).double()
    ended = torch.rand(3, 9) < 0.3
    found = ppo["advantages"](reward, value, ended)
    discount, trace = ppo["DISCOUNT"], ppo["TRACE"]
    for row in range(3):
        for begin in range(9):
            expected, weight = 0.0, 1.0
            for t in range(begin, 9):
                after = 0.0 if ended[row, t] else discount * value[row, t + 1]
                expected += weight * (reward[row, t] + after - value[row, t])
                weight *= discount * trace
                if ended[row, t]:
                    break
            assert found[row, begin].item() == pytest.approx(float(expected), rel=1e-9)


def test_an_ensemble_forecasts_as_its_members(example):
    ensemble = example("ensemble.py")
    members = [ensemble["Forecaster"]() for _ in range(3)]
    weights, forecast = ensemble["together"](members)
    x = torch.randn(2, 50)
    found, expected = forecast(x), torch.stack([m(x) for m in members])
    assert_close("forecasts", found, expected, rtol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, stacked in weights.items():
        own = torch.stack([m.get_parameter(name).grad for m in members])
        assert_close(f"gradient of {name}", stacked.grad, own, rtol=1e-4)


def test_names_of_characters_are_read_to_their_end(example):
    """Packed in any order, each name gives what it gives alone."""
    lengths = example("variable_lengths.py")
    data, categories = lengths["read"]()
    assert {"Ll", "Lu", "Sm"} <= set(categories)
    names = sorted(data["test"][0][:50], key=lambda n: -len(n))[::7]
    for layer in ("ParaLSTM", "nn.GRU"):
        model = lengths["Reader"](layer, len(categories))
        together = model(lengths["pack"](names))
        alone = torch.cat([model(lengths["pack"]([name])) for name in names])
        assert_close(layer, together, alone, rtol=1e-5)


def test_hours_since_a_value_was_seen(example):
    x, level = example("irregular_times.py")["patients"](5)
    value, seen, hours = x.unflatten(-1, (3, 2)).unbind(2)
    assert (value[seen == 0] == 0).all()
    assert level.shape == (5, x.shape[1], 1)
    apart = hours.diff(dim=1)
    assert (apart[seen[:, :-1] == 0] > 0).all()  # not seen: the hours go on
    gaps = [hours[:, t][seen[:, t - 1] == 1] for t in range(1, x.shape[1])]
    assert torch.cat(gaps).mean().item() == pytest.approx(1.0, rel=0.2)
