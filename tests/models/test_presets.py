"""Presets have the parameter counts and settings of the paper's Table 3."""

import pytest
import torch

from pararnn.lm.models import presets
from pararnn.lm.models.architectures import Shape, make_config, missing_kernels

MILLIONS = {
    "paragru": (406, 1415, 2902, 6757),
    "paralstm": (406, 1415, 2902, 6757),
    "transformer": (412, 1440, 2796, 6889),
    "mamba2": (409, 1425, 2832, 6960),
}


@pytest.mark.parametrize("architecture", presets.ARCHITECTURES)
@pytest.mark.parametrize("size", presets.SIZES)
def test_parameter_counts(architecture, size):
    model = presets.build(architecture, size, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6) == MILLIONS[architecture][presets.SIZES.index(size)]
    assert model.device.type == "meta"


def test_settings_of_the_paper():
    chosen = presets.preset("paragru", "400m")
    assert (chosen.learning_rate, chosen.weight_decay, chosen.z_loss_weight) == (5e-3, 1e-3, 1e-4)
    largest = presets.preset("paralstm", "7b")
    assert (largest.learning_rate, largest.weight_decay, largest.z_loss_weight) == (
        3e-3,
        1e-4,
        5e-6,
    )
    assert presets.preset("transformer", "1b").learning_rate == 2e-3
    tokens = largest.steps * largest.global_batch_size * presets.SEQUENCE_LENGTH
    assert round(tokens / 1e9, 1) == 138.4


def test_other_stacks_have_the_settings_of_paragru():
    stack = presets.build("m2rnn+delta", "400m", device="meta", num_layers=3)
    mixers = ["m2rnn", "delta", "m2rnn"]
    assert (stack.config.mixers, stack.config.hidden_size) == (mixers, 1024)
    assert presets.preset("3xparagru+attention", "1b") == presets.preset("paragru", "1b")
    assert presets.preset("mgu", "7b") == presets.preset("paragru", "7b")
    with pytest.raises(ValueError, match=r"no architecture 'mm2rnn' in 'mm2rnn\+delta'"):
        presets.preset("mm2rnn+delta", "400m")


def test_type_and_options():
    changes = {"conv_kernel": 2, "num_layers": 1, "vocab_size": 64, "rms_norm_eps": 1e-3}
    model = presets.build("paragru", "400m", device="meta", dtype=torch.bfloat16, **changes)
    assert model.dtype is torch.bfloat16
    assert (model.config.conv_kernel, model.config.num_hidden_layers) == (2, 1)
    assert (model.config.vocab_size, model.config.rms_norm_eps) == (64, 1e-3)
    assert torch.get_default_dtype() is torch.float32


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="architecture 'paragur'; perhaps you meant 'paragru'"):
        presets.build("paragur", "400m")
    with pytest.raises(ValueError, match=r"size '3b' .* 400m, 1b, 2.9b, 7b"):
        presets.build("paragru", "3b")
    shape = Shape(vocab_size=8, width=10, num_layers=1, num_heads=3)
    with pytest.raises(ValueError, match="width 10 cannot be split into 3 heads"):
        make_config("paragru", shape)


def test_missing_kernels_are_named(monkeypatch):
    assert missing_kernels("paragru") == missing_kernels("transformer") == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_kernels("mamba2") == "transformers' slow path: mamba-ssm is not installed"
