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
