"""The loss without all logits equals the one with them; documents of a sequence stay apart."""

import pytest
import torch

from pararnn.lm.models import causal_loss
from pararnn.lm.models.architectures import Shape, architectures, make_config, make_model
from pararnn.lm.models.causal_loss import CausalLoss, linear_cross_entropy, positions_in_documents
from pararnn.lm.models.loss import language_model_loss
from pararnn.testing import assert_close

SHAPE = Shape(vocab_size=23, width=16, num_layers=2, num_heads=4, initializer_range=0.3)


def model_of(architecture):
    model = make_model(make_config(architecture, SHAPE)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of PyTorch's compiler
@pytest.mark.parametrize(("rows_at_once", "compiled"), [(1, False), (4, True), (100, False)])
def test_equals_all_logits_at_once(monkeypatch, rows_at_once, compiled):
    monkeypatch.setattr(causal_loss, "_LOGITS_AT_ONCE", 23 * rows_at_once)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(23, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(23, (10,))
    targets[[2, 7]] = -100
    loss, cross_entropy, z_loss = linear_cross_entropy(hidden, weight, targets, 0.3, compiled)
    expected = language_model_loss(hidden @ weight.T, targets)
    assert_close("cross-entropy", cross_entropy, expected[0].detach(), rtol=1e-12)
    assert_close("z-loss", z_loss, expected[1].detach(), rtol=1e-12)
    assert not cross_entropy.requires_grad
    ours = torch.autograd.grad(1.7 * loss, [hidden, weight])
    theirs = torch.autograd.grad(1.7 * (expected[0] + 0.3 * expected[1]), [hidden, weight])
    for name, a, e in zip(("hidden", "weight"), ours, theirs, strict=True):
        assert_close(name, a, e, rtol=1e-12)


def test_nothing_to_predict_is_zero():
    hidden = torch.randn(4, 6, requires_grad=True)
    loss, *_ = linear_cross_entropy(hidden, torch.randn(23, 6), torch.full((4,), -100))
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss == 0
    assert not grad.any()


def test_autocast_computes_logits_in_half_precision():
    hidden, weight = torch.randn(40, 64, requires_grad=True), torch.randn(23, 64)
    targets = torch.randint(23, (40,))
    exact = linear_cross_entropy(hidden, weight, targets)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = linear_cross_entropy(hidden, weight, targets)[0]
    assert half.dtype is torch.float32
    assert half != exact
    assert_close("loss", half, exact, rtol=2e-2)


@pytest.mark.parametrize("architecture", architectures())
def test_loss_of_every_architecture_is_that_of_its_logits(architecture):
    model = model_of(architecture)
    tokens, targets = torch.randint(23, (2, 3, 9)).unbind()
    loss, *_ = CausalLoss(model, 0.1)(tokens, targets)
    cross_entropy, z_loss = language_model_loss(model(input_ids=tokens).logits, targets)
    assert_close("loss", loss.float(), (cross_entropy + 0.1 * z_loss).float(), rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("architecture", ["paragru", "paralstm", "transformer"])
def test_packed_documents_equal_separate_ones(architecture):
    model = CausalLoss(model_of(architecture))
    assert model.separates_documents
    lengths = [4, 1, 6]
    tokens, targets = torch.randint(23, (2, 1, sum(lengths))).unbind()
    resets = torch.zeros(1, sum(lengths), dtype=torch.bool)
    resets[0, [0, 4, 5]] = True
    packed, *_ = model(tokens, targets, resets)
    parts = zip(tokens.split(lengths, 1), targets.split(lengths, 1), lengths, strict=True)
    separate = sum(model(t, y)[0] * n for t, y, n in parts) / sum(lengths)
    assert_close("loss", packed, separate, rtol=1e-6)
    together, *_ = model(tokens, targets)
    assert (together - packed).abs() > 1e-4


def test_mamba2_says_that_it_cannot_separate_documents():
    model = CausalLoss(model_of("mamba2"))
    assert not model.separates_documents
    tokens = torch.randint(23, (1, 5))
    with pytest.raises(ValueError, match="Mamba2ForCausalLM cannot keep documents"):
        model(tokens, tokens, torch.ones(1, 5, dtype=torch.bool))


def test_positions_restart_at_documents():
    resets = torch.tensor([[False, False, True, False, True], [True, False, False, False, False]])
    assert positions_in_documents(resets).tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]
