"""A cell in a file of the user: trained, resumed, evaluated, generated from, opened elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pararnn.cli.main import main
from pararnn.lm.catalogue import CELLS, OwnName, check_architecture
from pararnn.lm.models import import_cell, import_cells
from pararnn.lm.training import RunError, TrainConfig, load_trained, train
from pararnn.lm.training.checks import import_own, try_step
from pararnn.lm.training.config import identity

CELL = """import torch
from torch import nn


class Resonator(nn.Module):
    def __init__(self, input_size, hidden_size, damping=-1.0, kind="sin"):
        super().__init__()
        self.drive = nn.Linear(input_size, hidden_size)
        self.stiffness = nn.Parameter(torch.ones(hidden_size))
        self.damping = nn.Parameter(torch.full((hidden_size,), damping))
        self.spring = getattr(torch, kind)

    def forward(self, x, state):
        position, velocity = state
        force = self.drive(x) - self.spring(self.stiffness * position)
        velocity = torch.sigmoid(self.damping) * velocity + 0.1 * force
        return position + 0.1 * velocity, velocity
"""
TINY = """--device cpu --checkpoint-every 2 --width 8 --layers 1 --seq-len 16 --batch-size 2
--text.validation-tokens 200 --data text.txt""".split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_cell.py").write_text(CELL)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    yield tmp_path
    forget()


def forget():
    """As in a new process."""
    for name in [name for name in CELLS if OwnName.of(name)]:
        del CELLS[name]


def start(*more):
    return main(["train", "--cell", "my_cell.py:Resonator", *TINY, "--steps", "4", *more])


def test_from_the_file_to_a_trained_model(folder, capsys):
    assert start("--out", "run", "--cell-options", "damping=-0.5", "kind=tanh") == 0
    printed = capsys.readouterr().out
    assert "Cell: Resonator of run/cell/my_cell.py, a copy that the run keeps" in printed
    assert (folder / "run/cell/my_cell.py").read_text() == CELL
    stored = json.loads((folder / "run/config.json").read_text())
    assert re.fullmatch(r"my_cell\.py:Resonator@[0-9a-f]{12}", stored["model"])
    cell = load_trained("run").model.layers[0].mixer.rnn.cell
    assert cell.spring.__name__ == "tanh"
    (folder / "my_cell.py").unlink()  # the run has its own

    for command, found in {
        "train --resume --out run --steps 6": "Resumed at step 4",
        "eval run": "bits per byte",
        "eval run/checkpoints/step-00000004": "bits per byte",
        "generate run --num-tokens 3 --prompt to": "to",
    }.items():
        forget()
        assert main(command.split()) == 0
        captured = capsys.readouterr()
        assert found in captured.out
        assert captured.err.startswith("Note: this runs the code in run/c")
        assert "my_cell.py, the cell of the run." in captured.err


def test_the_copy_of_a_run_must_not_change(folder, capsys):
    assert start("--out", "run") == 0
    (folder / "run/cell/my_cell.py").write_text(CELL + "# other\n")
    forget()
    assert main("train --resume --out run --steps 6".split()) == 1
    assert "cell/my_cell.py is not the file of this model" in capsys.readouterr().err
    (folder / "run/cell/my_cell.py").unlink()
    assert main("train --resume --out run --steps 6".split()) == 1
    assert "cannot read run/cell/my_cell.py" in capsys.readouterr().err


def test_the_card_of_a_checkpoint_opens_it_in_another_process(folder):
    assert start("--out", "run") == 0
    card = (folder / "run/checkpoints/step-00000004/README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    script = program + "\nassert next(generator.model.parameters()).isfinite().all()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ")


def test_a_checkpoint_away_from_its_run(folder, capsys):
    assert start("--out", "run") == 0
    shutil.move("run/checkpoints/step-00000004", "moved")
    (folder / "moved").rename(folder / "step-00000004")
    forget()
    with pytest.raises(ValueError, match=r"import_cells\(FOLDER\)"):
        AutoModelForCausalLM.from_pretrained("step-00000004")
    assert len(import_cells("step-00000004")) == 1
    AutoModelForCausalLM.from_pretrained("step-00000004")
    assert import_cells("step-00000004") == []
    capsys.readouterr()
    assert main(["eval", "step-00000004", "--data", "text.txt"]) == 0
    assert main(["eval", "step-00000004"]) == 1
    assert "lies away from the text of its run; give --data" in capsys.readouterr().err
    assert main("train --resume --out step-00000004".split()) == 1
    assert "is a checkpoint; name the folder of its run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ("", "my_cell.py:Resonatr", r"no nn.Module called Resonatr; perhaps you meant .*Resonator"),
        ("import absent_module\n", "my_cell.py:Resonator", r"absent_module' \(line 1\)\. A run ke"),
        ("def broken(:\n", "my_cell.py:Resonator", "SyntaxError"),
        ("raise KeyError('me')\n", "my_cell.py:Resonator", r"KeyError: 'me' \(line 1\)"),
        ("", "other.py:Resonator", "there is no file 'other.py'"),
        ("", "my_cell.py", "name the class of the cell too: my_cell.py:CLASS"),
        ("", "my_cell:Resonator", "perhaps you meant 'my_cell.py:Resonator'"),
    ],
)
def test_a_wrong_place_is_refused_with_the_reason(folder, change, place, message):
    (folder / "my_cell.py").write_text(change + CELL)
    with pytest.raises((ValueError, RunError), match=message):
        import_own(TrainConfig(model=place))


@pytest.mark.parametrize(
    ("line", "by", "options", "message"),
    [
        ("self.damping)", "self.dampng)", (), "has no attribute 'dampng'"),
        ("* velocity,", "* velocity.item(),", (), "cannot be trained"),
        ("super()", "super()", ("damp=3",), "has no option 'damp'; it has damping, kind"),
    ],
)
def test_a_wrong_cell_leaves_no_folder(folder, line, by, options, message, capsys):
    (folder / "my_cell.py").write_text(CELL.replace(line, by))
    assert start("--cell-options", *options) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["my_cell.py", "text.txt"]


def test_names():
    check_architecture("my_cell.py:Resonator@0123456789ab")  # of a run, which has the file
    assert OwnName.stored("my_cell.py:Resonator@0123456789ab")
    for name in ("my_cell.py:Resonator", "../my_cell.py:Resonator@0123456789ab", "paragru"):
        assert not OwnName.stored(name)
    with pytest.raises(ValueError, match="names no cell in a file"):
        import_cell("paragru")


def test_heads_are_given_to_a_cell_that_takes_them(folder):
    headed = CELL.replace("damping=-1.0", "damping=-1.0, num_heads=0, max_timescale=0.0")
    (folder / "my_cell.py").write_text(headed)
    made = CELLS[import_cell("my_cell.py:Resonator")]
    assert made(4, 6, num_heads=2).hidden_size == 6
    assert made.keeps is None


def test_options_of_a_cell_are_values():
    options = ("a=1", "b=tanh", "c=[1, 2]", "d=None", "e=x=y")
    config = TrainConfig(model="paragru", cell_options=options)
    assert config.options_of("cell_options") == {
        "a": 1,
        "b": "tanh",
        "c": [1, 2],
        "d": None,
        "e": "x=y",
    }
    assert "cell_options" not in identity(TrainConfig())
    assert identity(config)["cell_options"] == list(options)
    for wrong, message in [
        (("a",), "cell_options is a; it must be NAME=VALUE"),
        (("a=1", "a=2"), "given once for a name"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(cell_options=wrong)


def test_a_trial_changes_no_random_numbers(make_config):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    try_step(make_config(), torch.device("cpu"))
    assert torch.equal(torch.rand(2), expected)


def test_in_python(folder, make_config):
    config = make_config(model="my_cell.py:Resonator", data="text.txt", steps=2)
    result = train(config)
    assert result.validation.bits_per_byte > 0
    assert OwnName.stored(result.run.read_config().model)


def test_the_program_in_the_docs(folder):
    page = Path(__file__).parents[2] / "docs/reference/training.md"
    (program,) = re.findall(r"```python\n(from pararnn.lm.training .*?)```", page.read_text(), re.S)
    program = program.replace("width=128, num_layers=2", "width=8, num_layers=1, num_heads=1")
    program = program.replace('data="texts",', 'data="text.txt", steps=2, device="cpu",')
    names = {"__name__": "__main__"}
    exec(program, names)
    assert names["result"].step == 2
    assert names["model"].config.cell_options == {"damping": -0.5}


def test_a_file_that_imports_another_one_is_told_before_training(folder, capsys, monkeypatch):
    """It trains where the other can be imported; the run has only the one."""
    (folder / "springs.py").write_text("STIFFNESS = 1.0\n")
    imports = "import json\n\nimport numpy\nfrom springs import STIFFNESS\n\nimport pararnn\n"
    (folder / "my_cell.py").write_text(imports + CELL)
    monkeypatch.syspath_prepend(folder)
    assert start("--out", "run") == 0
    said = capsys.readouterr().err
    assert f"keeps a copy of my_cell.py, but not of {folder / 'springs.py'}" in said
    assert said.count("but not of") == 1  # Python's and installed packages are elsewhere too
    monkeypatch.delitem(sys.modules, "springs")
