"""Every mixer by its name: documents, pieces, caches, gradients, saving; and what is refused."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from pararnn import RNN, cells
from pararnn.lm import catalogue, linear
from pararnn.lm.decoding import generate
from pararnn.lm.models import (
    MEMORIES,
    ParaRNNCache,
    ParaRNNConfig,
    register_cell,
    register_memory,
)
from pararnn.lm.models.architectures import Shape, make_config, make_model, missing_kernels
from pararnn.lm.training.checkpoints import quiet_transformers
from pararnn.lm.training.comparison import step_by_step
from pararnn.lm.training.config import OptimizerConfig
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.testing import assert_close

from .conftest import tiny_config

KEYS, VALUES = 3, 4
MIXERS = {
    **{name: (name, {}) for name in ("paralstm", *MEMORIES, "attention")},
    "m2rnn, linear": ("m2rnn", {"nonlinearity": "linear"}),
    "delta, linear": ("delta", {"nonlinearity": "linear"}),
    "gated-deltanet, tanh": ("gated-deltanet", {"nonlinearity": "tanh"}),
    "m2rnn, keys of heads": ("m2rnn", {"shared_keys": False}),
}


def tiny(**changes):
    """A float64 model with no parameter left at a trivial value."""
    torch.manual_seed(1)
    model = make_model(tiny_config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def memory_options(name, **options):
    """Sizes for a memory; nothing for other mixers."""
    return {"key_size": KEYS, "value_size": VALUES, **options} if name in MEMORIES else None


@pytest.fixture(params=MIXERS, scope="module")
def model(request):
    """Two blocks of a mixer, with a cell of another kind between them."""
    name, options = MIXERS[request.param]
    return tiny(
        num_hidden_layers=3,
        mixers=[name, "paragru", name],
        attention_heads=2,
        memory_options=memory_options(name, **options),
    )


def test_packed_documents_equal_separate_ones(model, tokens):
    lengths, row = [4, 1, 6], tokens[:1]
    separate = torch.cat([model(part).logits for part in row.split(lengths, 1)], 1)
    packed = model(row, cu_seq_lens_q=torch.tensor([0, 4, 5, 11])).logits
    assert_close("packed", packed, separate, rtol=1e-9)
    resets = torch.zeros(1, 11, dtype=torch.bool)
    resets[0, [0, 4, 5]] = True
    cache, pieces = ParaRNNCache(), []
    for piece, starts in zip(row.split([3, 8], 1), resets.split([3, 8], 1), strict=True):
        pieces.append(model(piece, resets=starts, cache_params=cache, use_cache=True).logits)
    assert_close("with a carried state", torch.cat(pieces, 1), separate, rtol=1e-9)


@pytest.mark.parametrize("sizes", [[1] * 11, [5, 6]], ids=["steps", "pieces"])
def test_decoding_equals_the_whole(model, tokens, sizes):
    cache, pieces = ParaRNNCache(), []
    for piece in tokens.split(sizes, 1):
        pieces.append(model(piece, cache_params=cache, use_cache=True).logits)
    assert_close("pieces", torch.cat(pieces, 1), model(tokens).logits, rtol=1e-9)


def test_a_kept_cache_goes_on_twice(model, tokens, tmp_path):
    expected = model(tokens).logits[:, 6:]
    cache = model(tokens[:, :6], use_cache=True).cache_params
    torch.save(cache, tmp_path / "cache.pt")
    for kept in (copy.copy(cache), torch.load(tmp_path / "cache.pt", weights_only=False)):
        again = model(tokens[:, 6:], cache_params=kept).logits
        assert_close("continued", again, expected, rtol=1e-9)


def test_gradients_are_those_of_a_loop(model, tokens):
    """With documents that begin inside a row. Every parameter has one, and all are finite."""
    resets = torch.rand(tokens.shape) < 0.2
    loops = step_by_step(model)
    model.zero_grad()
    for each in (model, loops):
        each(tokens, labels=tokens, resets=resets).loss.backward()
    pairs = zip(model.named_parameters(), loops.parameters(), strict=True)
    for (name, parameter), reference in pairs:
        assert_close(name, parameter.grad, reference.grad, rtol=1e-7)


def test_saved_and_loaded(model, tokens, tmp_path):
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.memory_options == model.config.memory_options
    assert_close("logits", again(tokens).logits, model(tokens).logits, rtol=1e-12)


def test_decays_biases_and_norms_have_no_weight_decay(model):
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    decayed, others = (
        {id(p) for p in group["params"]} for group in optimizer.param_groups if group["params"]
    )
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-1]
        if kind in ("log_rate", "rate_bias", "skip", "bias", "recurrent") or parameter.dim() == 1:
            assert id(parameter) in others, name
        if "proj" in name:
            assert id(parameter) in decayed, name


def test_static_decoding_of_blocks_whose_windows_differ(tokens):
    model = tiny(
        num_hidden_layers=4,
        mixers=["m2rnn", "paragru", "gated-deltanet", "paralstm"],
        memory_options={"key_size": KEYS, "value_size": VALUES},
    )
    text = tokens
    for _ in range(5):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    assert generate(model, tokens.tolist(), max_new_tokens=5) == text[:, 11:].tolist()


def test_compiled(tokens):
    model = tiny(
        mixers=["m2rnn", "gated-deltanet"],
        memory_options={"key_size": KEYS, "value_size": VALUES},
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    resets = torch.zeros(tokens.shape, dtype=torch.bool)
    resets[:, 4] = True
    expected = model(tokens, resets=resets).logits
    assert_close("logits", compiled(tokens, resets=resets).logits, expected, rtol=1e-9)


def test_new_blocks_are_as_published():
    """Decays spread in the logarithm, `D` of ones, and the rest as in other blocks."""
    config = ParaRNNConfig(vocab_size=17, hidden_size=64, num_hidden_layers=1, cell="m2rnn")
    with torch.device("meta"):
        loaded = make_model(config).to_empty(device="cpu")
    for module in reversed(list(loaded.modules())):
        loaded._init_weights(module)
    for model in (make_model(config), loaded):
        mixer = model.model.layers[0].mixer
        assert torch.equal(mixer.skip, torch.ones(64))
        kept = mixer.rnn.cell.keep(torch.zeros(1, 4)).flatten()
        times = 1000 ** (torch.tensor([1, 3, 5, 7]) / 8)
        assert_close("times", -1 / torch.log(kept), times, rtol=1e-4)
        assert tuple(mixer.in_proj.weight.shape) == (2 * 64 + 64, 64)
        assert mixer.rnn.cell.state_shape == (4, 64, 16)


# What flash-linear-attention computes is checked against its documentation's equations, since its
# kernels need a GPU: `tests/gpu/test_linear.py` compares with those.


def simple_gla(q, k, v, g, scale, initial_state, output_final_state):
    return gated_delta(q, k, v, g, None, scale, initial_state, output_final_state)


def gated_delta(q, k, v, g, beta, scale, initial_state, output_final_state):
    """(batch, time, heads, size) each; g and beta (batch, time, heads). Returns also the state."""
    assert output_final_state
    h, outputs = initial_state, []
    if h is None:
        h = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    for t in range(q.shape[1]):
        q_t, k_t, v_t, g_t = (x[:, t] for x in (q, k, v, g))
        h = torch.exp(g_t)[..., None, None] * h
        if beta is not None:
            v_t = beta[:, t].unsqueeze(-1) * (v_t - (h * k_t.unsqueeze(-1)).sum(-2))
        h = h + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        outputs.append(scale * (h * q_t.unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, 1), h


FUNCTIONS = {"gated-deltanet": gated_delta, "mamba2": simple_gla}


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_another_package_is_asked_for(name, shared_keys, monkeypatch):
    """Values, states, documents and gradients are those of the step."""
    monkeypatch.setattr(Tensor := torch.Tensor, "float", lambda tensor: tensor)  # stay exact
    assert Tensor is torch.Tensor
    cell = MEMORIES[name](None, KEYS, VALUES, num_heads=2, shared_keys=shared_keys).double()
    x = torch.randn(3, 20, cell.input_size, dtype=torch.float64, requires_grad=True)
    state = torch.randn(3, *cell.state_shape, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(3, 20) < 0.2
    results = []
    for found in (
        RNN(cell)(x, state, resets),
        linear.evaluate(FUNCTIONS[name], catalogue.LINEAR[name], cell, x, state, resets),
    ):
        torch.manual_seed(3)
        total = sum((part * torch.randn_like(part)).sum() for part in found)
        results.append((*found, *torch.autograd.grad(total, [x, state, *cell.parameters()])))
    for place, (found, expected) in enumerate(zip(*results, strict=True)):
        assert_close(f"part {place}", found, expected, rtol=1e-9)


def test_where_another_package_can_be_used():
    cell = cells.GatedDeltaCell(None, KEYS, VALUES)
    assert not linear.fits(cell, torch.randn(2, 8, cell.input_size))  # no GPU, and float32
    on_gpu = torch.empty(2, 8, cell.input_size, dtype=torch.bfloat16, device="meta")
    assert not linear.fits(cell, on_gpu)


def test_a_package_that_is_missing_or_does_not_fit(monkeypatch):
    cell = cells.GatedDeltaCell(None, 64, 128)
    absent = linear.Operator("fla.not.there", "f", lambda *_: {})
    assert "is not installed (pip install 'pararnn[fla]')" in linear.missing(absent, 64, 64)
    broken = linear.Operator("torch.nn.functional", "no_such_function", lambda *_: {})
    assert "does not fit torch" in linear.missing(broken, 64, 64)
    assert "no_such_function" in linear.missing(broken, 64, 64)
    assert linear.missing(None, 64, 64) == ""
    assert linear.missing(linear.Operator("math", "exp", dict), 64, 16) == ""
    assert linear.choose(absent, cell, "auto") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert linear.choose(absent, cell, "auto") is None
    present = linear.Operator("torch.nn.functional", "silu", lambda *_: {})
    assert linear.choose(present, cell, "auto") is F.silu
    assert linear.choose(present, cell, "triton") is None
    monkeypatch.setitem(catalogue.LINEAR, "gated-deltanet", absent)
    note = missing_kernels("3xparagru+gated-deltanet")
    assert note.startswith("our step by step kernels for gated-deltanet: flash-linear-attention")


def test_sizes_of_which_another_package_has_wrong_gradients(monkeypatch):
    """On Hopper GPUs, whatever the memory and the options that give the size."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    present = linear.Operator("torch.nn.functional", "silu", lambda *_: {})
    flags = {"IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": False}
    monkeypatch.setitem(sys.modules, "fla.utils", SimpleNamespace(**flags))
    assert "before Triton 3.7.1" in linear.missing(present, 64, 64)
    monkeypatch.setitem(sys.modules, "fla.utils", SimpleNamespace(IS_NVIDIA_HOPPER=True))
    assert linear.missing(present, 64, 64) == linear.missing(present, 256, 192) == ""
    for size in [(64, 16), (64, 96), (32, 64)]:
        assert "multiples of 64; a head has {} and {}".format(*size) in linear.missing(
            present, *size
        )
        assert linear.choose(present, cells.GatedDeltaCell(None, *size), "auto") is None
    monkeypatch.setitem(catalogue.LINEAR, "mamba2", present)
    assert missing_kernels("paragru+mamba2") == ""  # by its usual sizes
    assert "a head has 96 and 64" in missing_kernels("paragru+mamba2", {"key_size": 96})
    assert "a head has 128 and 16" in missing_kernels("paragru+mamba2", {"value_size": 16})
    monkeypatch.setitem(sys.modules, "fla.utils", SimpleNamespace())  # another GPU
    assert linear.missing(present, 64, 16) == ""


def test_a_memory_of_ones_own(monkeypatch, tokens):
    class Adding(cells.MatrixMemoryCell):
        def forward(self, x, state):
            _, k, v, a = self.project(x)
            return self.keep(a) * state + k.unsqueeze(-1) * v.unsqueeze(-2)

        def readout(self, x, state):
            return torch.einsum("nhkv,nhk->nhv", state, self.project(x)[0]).flatten(-2)

    register_memory("adding", Adding)
    try:
        model = tiny(cell="adding", memory_options={"value_size": 4})
        assert model(tokens).logits.isfinite().all()
        for name in ("adding", "paragru", "attention"):
            with pytest.raises(ValueError, match=f"mixer name '{name}' is taken"):
                register_memory(name, cells.M2RNNCell)
    finally:
        del MEMORIES["adding"]


NOT_SPELLABLE = ["a+b", "m2rnn:key_size=8", "3xgru", "two words", "cell.py", "", "-gru", "gru\n"]


@pytest.mark.parametrize("register", [register_cell, register_memory])
@pytest.mark.parametrize("name", NOT_SPELLABLE)
def test_names_that_no_command_line_can_have(register, name):
    before = catalogue.mixers()
    with pytest.raises(ValueError, match=r"^mixer name .* begins with a letter\.$") as raised:
        register(name, cells.M2RNNCell)
    assert repr(name) in str(raised.value)
    with pytest.raises(ValueError, match=r"'transformer' is taken by 'a model of that name'"):
        register("transformer", cells.M2RNNCell)
    assert catalogue.mixers() == before


def test_every_name_can_be_part_of_a_stack():
    import pararnn.tasks.architectures  # which registers more

    assert set(pararnn.tasks.architectures.MORE_CELLS) < set(catalogue.CELLS)
    for name in catalogue.mixers():
        if not catalogue.OwnName.of(name):
            assert catalogue.parts(f"2x{name}+{name}") == [name] * 3


class InHeads(cells.M2RNNCell):
    """Its readout leaves the heads side by side in an axis of their own."""

    def readout(self, x, state):
        return super().readout(x, state).unflatten(-1, (self.num_heads, self.value_size))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (InHeads, r"memory 'mine' hands out \(2, 4\) for every token, but its block takes \(8,\)"),
        (
            lambda *_, **__: torch.nn.GRUCell(3, 3),
            "memory 'mine' is a GRUCell; give register_memory a factory that returns a MatrixMem",
        ),
    ],
)
def test_a_memory_of_ones_own_that_does_not_fit(monkeypatch, factory, message):
    monkeypatch.setitem(MEMORIES.data, "mine", factory)
    with pytest.raises(ValueError, match=message):
        tiny(cell="mine", memory_options={"value_size": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "m2rn"}, "there is no mixer 'm2rn'; perhaps you meant 'm2rnn'. There are: para"),
        ({"mixers": ["paragru", "gated-delta"]}, "perhaps you meant 'gated-deltanet'"),
        (
            {"memory_options": {"wrong": 1}},
            r"memory_options is {'wrong': 1}, but no block of the m",
        ),
        (
            {
                "cell": "m2rnn",
                "mixers": ["paragru", "attention"],
                "memory_options": {"key_size": 3},
            },
            "no block of the model has a memory; leave it out, or name a memory for a block",
        ),
        (
            {"cell": "m2rnn", "cell_options": {"bias": False}},
            r"cell_options is {'bias': False}, but no block of the model has a cell; leave it out,",
        ),
        (
            {"mixers": ["paragru", "elman"], "cell_options": {"bias": False, "gates": 2}},
            "^cell 'paragru' does not take cell_options 'gates'. They are bias, max_recurrent_w",
        ),
        ({"cell": "m2rnn", "memory_options": {"value_size": 16}}, "inner_size 8 cannot be split"),
        ({"cell": "m2rnn", "memory_options": {"value_size": 0}}, "heads of 0 values"),
        (
            {"cell": "delta", "memory_options": {"value_size": 4, "heads": 2}},
            r"memory 'delta' does not take memory_options .*'heads'.*They are key_size, value_size",
        ),
        (
            {"cell": "outer", "memory_options": {"value_size": 4, "nonlinearity": "relu"}},
            "nonlinearity is 'relu'; it must be 'tanh' or 'linear'",
        ),
        ({"cell": "outer", "memory_options": {"value_size": 4, "key_size": 0}}, "key_size is 0"),
        (
            {"cell": "outer", "memory_options": {"value_size": 4, "shared_keys": "no"}},
            r"'key_size': 64, .*: shared_keys must be True or False, got 'no'\. They are key_size",
        ),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("paragru", {"memory_options": {"key_size": 128, "value_size": 16, "wrong": 1}}),
        ("attention", {"cell_options": {"max_timescale": 9}, "memory_options": {"value_size": 3}}),
        ("m2rnn", {"cell_options": {"max_timescale": 9}}),
    ],
)
def test_stored_before_unused_options_were_refused(name, options, tokens, tmp_path):
    """They are left out; the model is the same."""
    sizes = {"attention_heads": 2, "memory_options": memory_options(name)}
    model = tiny(cell=name, **sizes)
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(stored | options))
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.cell_options == model.config.cell_options == {}
    assert again.config.memory_options == model.config.memory_options
    assert_close("logits", again(tokens).logits, model(tokens).logits, rtol=1e-12)


@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_options_of_a_baseline(name):
    shape = Shape(vocab_size=17, width=32, num_layers=2, num_heads=2)
    for field, kind in [("cell_options", "cell"), ("memory_options", "memory")]:
        message = f"^{field} is {{'key_size': 8}}, but no block of {name} has a {kind}; leave it"
        with pytest.raises(ValueError, match=message):
            make_config(name, shape, **{field: {"key_size": 8}})


def test_stacks_in_one_line():
    assert catalogue.parts("2xparagru+m2rnn+attention") == ["paragru"] * 2 + ["m2rnn", "attention"]
    shape = Shape(vocab_size=17, width=32, num_layers=7, num_heads=2)
    config = make_config("2xparagru+delta", shape)
    assert config.mixers == ["paragru", "paragru", "delta"] * 2 + ["paragru"]
    assert make_config("1xmamba2", shape).mixers == ["mamba2"] * 7
    assert make_config("mamba2", shape).model_type == "mamba2"
    with pytest.raises(ValueError, match="'8xparagru' has 8 blocks but the model has 7"):
        make_config("8xparagru", shape)
    with pytest.raises(ValueError, match=r"no architecture 'delt' in '2xparagru\+delt'; perhaps"):
        make_config("2xparagru+delt", shape)


def test_every_memory_of_a_stack_has_its_usual_sizes():
    """Unless the model says; what it says holds for all, and is what its file keeps."""
    mixers = ["m2rnn", "gated-deltanet", "mamba2"]
    for given, sizes in {
        (): [(64, 16), (128, 64), (128, 64)],
        (("key_size", 32),): [(32, 16), (32, 64), (32, 64)],
        (("key_size", 32), ("value_size", 32)): [(32, 32)] * 3,
    }.items():
        model = tiny(hidden_size=64, mixers=mixers, num_hidden_layers=3, memory_options=dict(given))
        cells_made = [layer.mixer.rnn.cell for layer in model.model.layers]
        assert [(cell.key_size, cell.value_size) for cell in cells_made] == sizes
        assert [cell.num_heads for cell in cells_made] == [64 // values for _, values in sizes]
        assert model.config.memory_options == dict(given)
    small = tiny(hidden_size=24, mixers=["m2rnn", "mamba2"], num_hidden_layers=2)
    assert [layer.mixer.rnn.cell.value_size for layer in small.model.layers] == [8, 8]


def test_options_that_not_all_cells_take_are_left_out():
    given = {"max_timescale": 50.0, "max_recurrent_weight": 0.5}
    assert catalogue.cell_options(["paragru", "m2rnn"], given) == given
    assert catalogue.cell_options(["paragru", "elman"], given) == {"max_recurrent_weight": 0.5}
    assert catalogue.cell_options(["m2rnn", "attention"], given) == {}
