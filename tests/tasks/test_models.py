"""Models of all architectures in all forms: what they are made of, and that they are causal."""

import dataclasses
import math

import pytest
import torch

from pararnn.cells import DiagonalCell
from pararnn.lm.catalogue import CELLS, MEMORIES, check_architecture
from pararnn.lm.models.attention import AttentionMixer
from pararnn.lm.models.memory import MemoryMixer
from pararnn.lm.models.recurrence import ParaRNNMixer
from pararnn.tasks import TASKS, draw
from pararnn.tasks.architectures import ARCHITECTURES
from pararnn.tasks.models import build_model, sinusoids
from pararnn.tasks.settings import SuiteConfig, settings_for

FORMS = {"cell": "parity", "mixer": "1-hop", "blocks": "s3"}
HYBRID = "paragru+attention"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")


def smoke(task, **changes):
    return settings_for(task, "smoke", changes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, HYBRID])
def test_all_in_all_forms(architecture, form):
    """Every parameter has a gradient, and no answer depends on later tokens."""
    task = TASKS[FORMS[form]]
    settings = smoke(FORMS[form])
    assert settings.form == form
    model = build_model(task, architecture, settings)
    batch = draw(task, 4, 12, split="train", seed=0, device="cpu")
    logits = model(batch.tokens)
    assert logits.shape[:2] == (4, 12)
    assert logits.shape[2] >= task.num_classes
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    other = batch.tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % task.vocab_size
    with torch.no_grad():
        before, after = model(batch.tokens), model(other)
    assert (before[:, :7] - after[:, :7]).abs().max() < 1e-4
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def test_every_cell_of_the_library_is_among_them():
    import pararnn.cells

    bases = {DiagonalCell, pararnn.cells.MatrixMemoryCell}
    kinds = {k for k in vars(pararnn.cells).values() if isinstance(k, type)} - bases
    found = set()
    for name in CELLS:
        found.update(type(CELLS[name](8, 8, num_heads=2)).__mro__)
    for name in MEMORIES:
        found.update(type(MEMORIES[name](8, 4, 4)).__mro__)
    assert kinds - found == set()


def test_parts_are_those_of_the_language_models():
    task = TASKS["1-hop"]
    model = build_model(task, "paragru", smoke("1-hop"))
    (mixer,) = (m for m in model.modules() if isinstance(m, ParaRNNMixer))
    assert len(mixer.conv.weight) == 4
    model = build_model(task, HYBRID, smoke("1-hop"))
    kinds = [type(m) for m in model.modules() if isinstance(m, (ParaRNNMixer, AttentionMixer))]
    assert kinds == [ParaRNNMixer, AttentionMixer]
    model = build_model(task, "m2rnn+mamba2", smoke("1-hop"))  # the memory, not the baseline
    (m2rnn, mamba2) = (m for m in model.modules() if isinstance(m, MemoryMixer))
    assert m2rnn.rnn.cell.state_shape == mamba2.rnn.cell.state_shape == (4, 8, 8)
    model = build_model(TASKS["s3"], HYBRID, smoke("s3", num_layers=4)).model
    assert model.config.mixers == ["paragru", "attention"] * 2


def test_bounds_and_timescales_reach_the_cells():
    def cell_of(name, task, **changes):
        model = build_model(TASKS[task], name, smoke(task, **changes))
        return next(m for m in model.modules() if isinstance(m, DiagonalCell))

    assert cell_of("paragru", "parity").max_recurrent_weight is None
    assert cell_of("paragru", "1-hop").max_recurrent_weight == 0.9
    cell = cell_of("paragru", "1-hop", max_timescale=50.0)
    assert cell.bias[0].min().item() == pytest.approx(-math.log(49), rel=1e-5)
    assert cell_of("paragru", "1-hop", max_timescale=None).bias.abs().max() == 0
    assert cell_of("elman", "s3", max_timescale=50.0).max_timescale is None  # it has no such gate
    for name in ("dense-gru", "m2rnn", "paragru+elman"):
        build_model(TASKS["s3"], name, smoke("s3", max_timescale=50.0))


def test_sizes_of_the_full_models():
    """As the settings say: those of the paper, and 0.3 to 8 million parameters for the others."""
    for task in TASKS:
        settings = settings_for(task, "full")
        for architecture in ("paragru", "transformer", "layer-norm-lstm"):
            model = build_model(TASKS[task], architecture, settings)
            size = sum(p.numel() for p in model.parameters())
            least, most = (2e3, 7e4) if settings.form != "blocks" else (3e5, 8e6)
            if settings.form != "blocks":
                most *= (
                    settings.num_layers
                )  # two where one does not suffice, as it does in the paper
            assert least < size < most, (task, architecture, size)


def test_same_weights_from_the_same_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(build_model(TASKS["s3"], "paragru", smoke("s3")))
    states = [torch.cat([p.flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_positions_tell_steps_apart():
    waves = sinusoids(1600, 63, torch.device("cpu"))
    assert waves.shape == (1600, 63)
    distances = torch.cdist(waves[:200], waves[:200]) + 9 * torch.eye(200)
    assert distances.min() > 0.1
    assert torch.equal(waves[:10], sinusoids(10, 63, torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paragur", "no architecture 'paragur'; perhaps you meant 'paragru'"),
        (
            "paragru+transformer",
            "'transformer' in 'paragru\\+transformer'; perhaps you meant 'attention'",
        ),
        ("paragru+", "no architecture '' in 'paragru\\+'"),
        ("attention", "no architecture 'attention'"),
    ],
)
def test_unknown_architecture(name, message):
    with pytest.raises(ValueError, match=message):
        check_architecture(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"learning_rate": -1.0}, "learning-rate is -1.0; it must be more than 0"),
        ({"learning_rate": math.nan}, "learning-rate is nan"),
        ({"width": 30}, "width 30 cannot be split into 4 heads"),
        ({"length": 3}, "length is 3, but sequences of keep-nth have at least 5"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_for("keep-nth", "full", changes)


def test_the_papers_settings():
    settings = settings_for("mqar", "paper")
    assert settings.steps == 1_875_000
    assert (settings.batch_size, settings.learning_rate) == (16, 5e-4)
    assert (settings.width, settings.num_layers, settings.num_heads) == (64, 1, 4)
    assert settings.max_timescale is None
    assert (
        settings_for("2-hop", "paper").num_layers,
        settings_for("2-hop", "full").num_layers,
    ) == (
        1,
        2,
    )
    assert dataclasses.replace(settings, steps=10).schedule == "cosine"
    with pytest.raises(ValueError, match="the paper has no task 's5'"):
        settings_for("s5", "paper")


def test_a_cell_in_a_file_is_refused_before_anything_is_written(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("class Mine: pass\n")
    with pytest.raises(ValueError, match="which tasks do not take; name it by register_cell"):
        SuiteConfig(architectures=(f"{file}:Mine",))
