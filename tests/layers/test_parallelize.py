"""`parallelize`: an `nn.GRU`, `nn.LSTM` or `nn.RNN` and what is made of it agree in everything."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import pararnn
from pararnn import Newton, parallelize
from pararnn.testing import assert_close

LAYERS = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "rnn tanh": nn.RNN,
    "rnn relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
INPUT, HIDDEN = 5, 6


def make(kind, **options):
    return LAYERS[kind](INPUT, HIDDEN, dtype=torch.float64, **options)


def random_state(kind, rows, *batch):
    parts = [torch.randn(rows, *batch, HIDDEN, dtype=torch.float64) for _ in range(2)]
    return tuple(parts) if kind == "lstm" else parts[0]


def tensors(result):
    """All tensors of what a layer took or returned, flat."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result or () for t in tensors(part)]


def gradients(layer, x, state, parameters):
    """Results of a call, and the gradients of everything that went in, with random cotangents."""
    given = [t.requires_grad_() for t in [*tensors(x), *tensors(state), *parameters]]
    result = layer(x, state)
    values = tensors(result)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
    return result, [*values, *torch.autograd.grad(values, given, cotangents)]


def agree(original, x, state, **options):
    ours = parallelize(original, **options)
    parameters = list(original.parameters())
    expected, values = gradients(original, x, state, parameters)
    actual, found = gradients(ours, x, state, parameters)
    for i, (a, e) in enumerate(zip(found, values, strict=True)):
        assert_close(f"value or gradient {i}", a, e, rtol=1e-12)
    return actual, expected


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(kind, num_layers, bidirectional, batch_first, bias):
    layer = make(
        kind,
        num_layers=num_layers,
        bidirectional=bidirectional,
        batch_first=batch_first,
        bias=bias,
    )
    x = torch.randn(3, 7, INPUT, dtype=torch.float64)
    batch = 3 if batch_first else 7
    agree(layer, x, random_state(kind, num_layers * (1 + bidirectional), batch))
    agree(layer, x, None)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_single_sequence(kind, batch_first):
    layer = make(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    agree(layer, torch.randn(9, INPUT, dtype=torch.float64), random_state(kind, 4))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [(5, 9, 1, 9), (6, 4, 4, 2), (3,)], ids=str)
def test_packed_sequences(kind, bidirectional, lengths):
    layer = make(kind, num_layers=2, bidirectional=bidirectional)
    data = [torch.randn(n, INPUT, dtype=torch.float64) for n in lengths]
    is_sorted = list(lengths) == sorted(lengths, reverse=True)
    packed = pack_sequence(data, enforce_sorted=is_sorted)
    state = random_state(kind, 2 * (1 + bidirectional), len(lengths))
    actual, expected = agree(layer, packed, state)
    for a, e in zip(actual[0][1:], expected[0][1:], strict=True):
        assert (a is None and e is None) or torch.equal(a, e)


def test_a_state_that_explodes_in_padding_harms_nothing():
    layer = make("rnn relu")
    with torch.no_grad():
        layer.weight_hh_l0.mul_(100)
        layer.bias_ih_l0.fill_(1.0)
    data = [torch.randn(n, INPUT, dtype=torch.float64) for n in (2, 300)]
    data[1] -= 1e4 * layer.weight_ih_l0.detach().sum(0)  # keeps the long one at zero
    agree(layer, pack_sequence(data, enforce_sorted=False), None)


@pytest.mark.parametrize("kind", LAYERS)
def test_float32_and_settings(kind):
    layer = make(kind, batch_first=True).float()
    x = torch.randn(2, 40, INPUT)
    ours = parallelize(layer, solver=Newton(chunk=8), backend="torch")
    assert_close("y", ours(x)[0], layer(x)[0], rtol=1e-5)
    assert ours.layers[0].solver == Newton(chunk=8)
    assert ours.layers[0].backend == "torch"


def test_dropout_between_layers_only_in_training():
    layer = make("gru", num_layers=2, dropout=0.5)
    x = torch.randn(4, 3, INPUT, dtype=torch.float64)
    ours = parallelize(layer)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    assert_close("y", parallelize(layer.eval())(x)[0], layer(x)[0], rtol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_one_trains_the_other(kind):
    layer = make(kind, num_layers=2, bidirectional=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ours = parallelize(layer)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in layer.parameters()}
    x = torch.randn(4, 3, INPUT, dtype=torch.float64)
    before = layer(x)[0]
    ours(x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x)[0], before)
    assert_close("y", ours(x)[0], layer(x)[0], rtol=1e-12)


@pytest.mark.parametrize("moved", ["ours", "original"])
def test_moving_one_moves_the_other(moved):
    layer = make("gru", num_layers=2)
    ours = parallelize(layer)
    (ours if moved == "ours" else layer).to(torch.float32)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in layer.parameters()}
    x = torch.randn(4, 3, INPUT)
    assert_close("y", ours(x)[0], layer(x)[0], rtol=1e-5)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"words": nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True)})
        self.stack = nn.Sequential(nn.GRU(2 * HIDDEN, HIDDEN), nn.GRU(HIDDEN, HIDDEN))
        self.stack.append(self.stack[1])  # one layer twice
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x):
        self.encoder["words"].flatten_parameters()
        y, _ = self.encoder["words"](input=x, hx=None)
        for layer in self.stack:
            y, _ = layer(y)
        return self.head(y)


def test_layers_inside_a_module_are_replaced():
    model = Tagger().double()
    x = torch.randn(4, 3, INPUT, dtype=torch.float64)
    expected, count = model(x), len(list(model.parameters()))
    assert parallelize(model, solver=Newton(chunk=2)) is model
    assert not any(isinstance(m, nn.RNNBase) for m in model.modules())
    assert model.stack[1] is model.stack[2]
    assert model.encoder["words"].layers[3].solver == Newton(chunk=2)
    assert len(list(model.parameters())) == count
    assert_close("y", model(x), expected, rtol=1e-12)


def test_checkpoints_go_both_ways():
    model = Tagger()
    saved = {name: t.clone() for name, t in model.state_dict().items()}
    ours = parallelize(Tagger())
    assert list(ours.state_dict()) == list(saved)
    ours.load_state_dict(saved)
    x = torch.randn(4, 3, INPUT)
    assert_close("y", ours(x), model(x), rtol=1e-5)
    other = Tagger()
    other.load_state_dict(ours.state_dict())
    assert_close("y", other(x), model(x), rtol=1e-12)
    saved["stack.0.weight_ih_l9"] = torch.zeros(1)
    del saved["stack.0.weight_hh_l0"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*stack\.0\..*Unexpected.*weight_ih_l9"):
        ours.load_state_dict(saved)


def test_parameters_have_the_names_of_the_original():
    layer = make("lstm", num_layers=2, bidirectional=True)
    ours = parallelize(layer)
    assert list(ours.named_parameters()) == list(layer.named_parameters())
    for name, parameter in layer.named_parameters():
        assert getattr(ours, name) is parameter
    assert ours.all_weights == layer.all_weights
    assert ours._flat_weights == layer._flat_weights
    ours.flatten_parameters()
    with pytest.raises(AttributeError, match="has no attribute 'weight_ih_l2'"):
        _ = ours.weight_ih_l2
    saved = get_model_state_dict(nn.Sequential(ours))  # looks them up as attributes
    assert list(saved) == [f"0.{name}" for name in layer.state_dict()]


class Twice(nn.Module):
    def forward(self, weight):
        return 0.5 * weight.tanh()


def other_weight(layer):
    torch.manual_seed(3)
    layer.weight_hh_l1 = nn.Parameter(torch.randn_like(layer.weight_hh_l1) * 0.3)


def taken_away_and_back(layer):
    weight = layer.weight_ih_l0_reverse
    del layer.weight_ih_l0_reverse
    layer.register_parameter("weight_ih_l0_reverse", nn.Parameter(weight.detach() * 0.5))


def normed(layer):
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.weight_norm(layer, "weight_ih_l1_reverse")


def normed_no_more(layer):
    normed(layer)
    parametrize.register_parametrization(layer, "weight_hh_l0", Twice())
    parametrize.remove_parametrizations(layer, "weight_hh_l0")


def normed_by_hooks(layer):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer, "weight_hh_l0")


def another_checkpoint(layer):
    torch.manual_seed(4)
    saved = {name: torch.randn_like(t) for name, t in layer.state_dict().items()}
    layer.load_state_dict(saved, assign=True)


def another_type(layer):
    layer.float().double()


CHANGES = [
    other_weight,
    taken_away_and_back,
    normed,
    normed_no_more,
    normed_by_hooks,
    another_checkpoint,
    another_type,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
def test_a_layer_that_changes(change, when):
    """As the original that changes in the same way: values, gradients, names and checkpoints."""
    torch.manual_seed(2)
    layer = make("lstm", num_layers=2, bidirectional=True)
    ours = parallelize(copy.deepcopy(layer))
    x = torch.randn(4, 3, INPUT, dtype=torch.float64)
    if when == "after":
        ours(x)
    for each in (layer, ours):
        change(each)
    saved = layer.state_dict()
    assert list(ours.state_dict()) == list(saved)
    names = [name for name, _ in layer.named_parameters()]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for each in (layer, ours):
        each(x)[0].square().sum().backward()
    assert [name for name, _ in ours.named_parameters()] == names
    gradients = dict(layer.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(name, parameter.grad, gradients[name].grad, rtol=1e-10)
    assert_close("y", ours(x)[0], layer(x)[0], rtol=1e-12)
    ours.load_state_dict({name: 0.9 * t for name, t in saved.items()})
    layer.load_state_dict({name: 0.9 * t for name, t in saved.items()})
    assert_close("y", ours(x)[0], layer(x)[0], rtol=1e-12)
    if change is not normed_by_hooks:  # PyTorch copies no tensor that a hook has computed
        assert_close("y", copy.deepcopy(ours)(x)[0], layer(x)[0], rtol=1e-12)


def test_a_layer_that_was_parametrised_before():
    layer = make("gru", num_layers=2)
    normed_layer = parametrizations.weight_norm(layer, "weight_hh_l1")
    agree(normed_layer, torch.randn(4, 3, INPUT, dtype=torch.float64), None)
    assert list(parallelize(layer).state_dict()) == list(layer.state_dict())


def test_weights_drawn_anew():
    ours = parallelize(make("gru"))
    torch.manual_seed(1)
    ours.reset_parameters()
    layer = make("gru")
    torch.manual_seed(1)
    layer.reset_parameters()
    for found, expected in zip(ours.parameters(), layer.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    ours = parallelize(make("lstm", num_layers=2))
    x = torch.randn(4, 3, INPUT, dtype=torch.float64)
    expected, other = ours(x)[0], copied(ours)
    assert_close("y", other(x)[0], expected, rtol=1e-12)
    other.load_state_dict({n: 0 * t for n, t in ours.state_dict().items()})
    assert not other(x)[0].any()
    assert_close("y", ours(x)[0], expected, rtol=1e-12)


def test_steps_equal_the_whole():
    layer = make("lstm", num_layers=2, batch_first=True)
    ours = parallelize(layer)
    x = torch.randn(2, 5, INPUT, dtype=torch.float64)
    state, outputs = None, []
    for t in range(5):
        y, state = ours.step(x[:, t], state)
        outputs.append(y)
    assert_close("y", torch.stack(outputs, 1), layer(x)[0], rtol=1e-12)


class OwnGRU(nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


def weight_normed():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.GRU(INPUT, HIDDEN), "weight_hh_l0")


@pytest.mark.parametrize(
    ("module", "error", "words"),
    [
        (lambda: nn.LSTM(5, 6, proj_size=3), ValueError, "LSTM has proj_size=3, which"),
        (lambda: nn.ModuleDict({"a": nn.LSTM(5, 6, proj_size=3)}), ValueError, "LSTM 'a' has proj"),
        (lambda: nn.Linear(5, 6), ValueError, "Linear is and contains no nn.GRU"),
        (
            lambda: nn.Sequential(OwnGRU(5, 6)),
            ValueError,
            "subclasses and what was parallelized before",
        ),
        (weight_normed, ValueError, "weight_hh_l0 of GRU is not a parameter but computed"),
        (lambda: parallelize(nn.GRU(5, 6)), ValueError, "what was parallelized before are left"),
        (lambda: nn.GRUCell(5, 6), ValueError, r"wrap a cell as pararnn\.RNN\(cell\)"),
        (lambda: torch.zeros(3), TypeError, "takes an nn.Module, got a Tensor"),
    ],
)
def test_mistakes(module, error, words):
    with pytest.raises(error, match=words):
        parallelize(module())


def test_nothing_is_replaced_when_something_cannot_be():
    model = nn.ModuleList([nn.GRU(5, 6), nn.LSTM(5, 6, proj_size=3)])
    with pytest.raises(ValueError, match="proj_size=3"):
        parallelize(model)
    assert type(model[0]) is nn.GRU


def test_wrong_calls():
    ours, lstm = parallelize(nn.GRU(5, 6, 2)), parallelize(nn.LSTM(5, 6))
    x, zeros = torch.randn(4, 3, 5), torch.zeros(1, 3, 6)
    with pytest.raises(ValueError, match=r"x has shape \(20, 4\); pass \(time, batch, 5\), or"):
        ours(torch.randn(20, 4))
    with pytest.raises(TypeError, match=r"a tensor of shape \(2, 3, 6\), got a tuple of Tensor, T"):
        ours(x, (zeros, zeros))
    with pytest.raises(TypeError, match=r"a tuple of 2 tensors of shape \(1, 3, 6\), got a Tensor"):
        lstm(x, zeros)
    with pytest.raises(TypeError, match=r"a tuple of 2 tensors .* got a list of Tensor, T"):
        lstm(x, [zeros, zeros])
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4\); pass \(time, batch, 5\)"):
        ours(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"state has shape \(1, 3, 6\); pass \(2, 3, 6\)"):
        ours(x, zeros)
    assert isinstance(ours, pararnn.layers.stacked.StackedRNN)
