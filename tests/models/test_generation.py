"""Generation from static tensors: equal to transformers', ragged equal to one by one, sampling."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from pararnn import RNN
from pararnn.kernels.matvec_fusion import FuseMatvecs
from pararnn.lm.decoding import Decoder, generate
from pararnn.lm.decoding import decoder as generation
from pararnn.lm.decoding.states import recurrent
from pararnn.planning.costs import COSTS
from pararnn.testing import assert_close

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9]]


@pytest.mark.parametrize("size", [1, 17, 1024, 1025, 50432])
def test_the_largest_score_in_parts(size):
    scores = torch.randn(3, size)
    scores[1] = -torch.inf
    scores[1, size // 2] = -1e30
    assert torch.equal(generation.largest(scores), scores.argmax(-1, keepdim=True))


@pytest.mark.parametrize("kernel", [1, 4])
def test_greedy_equals_transformers(make_model, tokens, cell, kernel):
    model = make_model(cell=cell, conv_kernel=kernel)
    settings = GenerationConfig(max_new_tokens=40, do_sample=False)
    expected = model.generate(tokens, generation_config=settings)[:, tokens.shape[1] :]
    assert generate(model, tokens.tolist(), max_new_tokens=40) == expected.tolist()
    assert len({tuple(row) for row in expected.tolist()}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ragged_equals_one_by_one(make_model, cell, temperature, monkeypatch):
    """With the same noise in every row, so that sampling may be compared too."""
    model = make_model(cell=cell)
    draw = Decoder._draw

    def same_for_all(self):
        if self._generator is not None:
            row = torch.empty(17).exponential_(generator=self._generator)
            self._noise.copy_(row.expand_as(self._noise))

    monkeypatch.setattr(Decoder, "_draw", same_for_all if temperature else draw)
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 2}
    together = generate(model, PROMPTS, **settings)
    assert together == [generate(model, [prompt], **settings)[0] for prompt in PROMPTS]


def test_a_decoder_may_be_used_again(make_model, cell):
    """Nothing of a call is left in the tensors that the next one uses."""
    model = make_model(cell=cell)
    decoder = Decoder(model, 3)
    expected = decoder.generate(PROMPTS, max_new_tokens=9)
    where = [layer.window.data_ptr() for layer in decoder._states.layers]
    others = decoder.generate(PROMPTS[::-1], max_new_tokens=5, temperature=2.0, end_of_text=7)
    assert others != expected
    assert decoder.generate(PROMPTS, max_new_tokens=9) == expected
    assert [layer.window.data_ptr() for layer in decoder._states.layers] == where


CHANGES = {
    "weights in place": (lambda m: m.lm_head.weight.data.neg_(), 0),
    "other weights": (lambda m: setattr(m.lm_head.weight, "data", -m.lm_head.weight.data), 1),
    "another parameter": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(-m.lm_head.weight)),
        1,
    ),
    "a hook": (lambda m: m.lm_head.register_forward_hook(lambda m, x, y: -y), 1),
    "a hook in a cell": (
        lambda m: next(c for c in m.modules() if isinstance(c, RNN)).cell.register_forward_hook(
            lambda m, x, y: y * 0.5
        ),
        1,
    ),
    "another module": (lambda m: setattr(m, "lm_head", nn.Linear(8, 17).double()), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_sees_what_has_changed(make_model, change, monkeypatch):
    made = []
    monkeypatch.setattr(generation, "captured_step", lambda run, device: made.append(1) or run)
    model = make_model()
    decoder = Decoder(model, 3)
    before = decoder.generate(PROMPTS, max_new_tokens=9)
    assert decoder.generate(PROMPTS, max_new_tokens=9) == before
    assert len(made) == 1
    apply, times = CHANGES[change]
    apply(model)
    after = decoder.generate(PROMPTS, max_new_tokens=9)
    assert len(made) == 1 + times
    assert after != before
    assert after == generate(model, PROMPTS, max_new_tokens=9)


def test_steps_run_one_token_on_the_same_tensors(make_model, monkeypatch):
    model, seen = make_model(), []
    forward = type(model).forward

    def spy(self, input_ids=None, **kwargs):
        seen.append((tuple(input_ids.shape), input_ids.data_ptr()))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    generate(model, PROMPTS, max_new_tokens=5)
    assert [shape for shape, _ in seen] == [(3, 8), *[(3, 1)] * 4]
    assert len({pointer for _, pointer in seen[1:]}) == 1


def test_the_step_can_be_compiled_and_captured(make_model, cell, monkeypatch):
    """As one graph, and without an operation for which the host waits for the device."""
    compile_step = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(generation.torch, "compile", compile_step)
    model = make_model(cell=cell)
    expected = generate(model, PROMPTS, max_new_tokens=8)
    decoder = Decoder(model, 3, compiled=True)
    assert decoder.generate(PROMPTS, max_new_tokens=8) == expected
    plain = Decoder(model, 3)
    plain.start(PROMPTS, temperature=1.0)
    with Operations() as seen:
        plain.step()
    assert "pararnn.solve.default" in seen.names
    waits = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.lift_fresh.default"}
    assert not seen.names & waits


def test_runs_before_the_capture_leave_no_trace(make_model, cell, monkeypatch):
    """As on a GPU, where a step is run to compile it and to allocate."""
    model = make_model(cell=cell)
    expected = generate(model, PROMPTS, max_new_tokens=12, end_of_text=3)

    def captured(run, device):
        run()
        run()
        return run

    monkeypatch.setattr(generation, "captured_step", captured)
    assert generate(model, PROMPTS, max_new_tokens=12, end_of_text=3) == expected
    ended = Decoder(model, 3)
    ended.start(PROMPTS, end_of_text=expected[0][0])
    assert ended._ended.flatten().tolist() == [row[0] == expected[0][0] for row in expected]


class Operations(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("compiled", [False, True])
def test_the_captured_step_equals_transformers(make_model, tokens, cell, compiled):
    model = make_model(cell=cell).float().to("cuda")
    decoder = Decoder(model, 3, compiled=compiled)
    settings = GenerationConfig(max_new_tokens=40, do_sample=False)
    for given in (tokens, tokens.flip(1)):
        expected = model.generate(given.to("cuda"), generation_config=settings)
        found = decoder.generate(given.tolist(), max_new_tokens=40)
        assert found == expected[:, tokens.shape[1] :].tolist()
    samples = [
        decoder.generate(PROMPTS, max_new_tokens=40, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert samples[0] == samples[1]
    assert samples[0] != samples[2]


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("cell", "kernel"), [("paragru", 4), ("paralstm", 2), ("slstm", 1)])
def test_a_compiled_step_leaves_the_same_states(make_model, cell, kernel, device):
    """For one text, whose products with weights are kernels of our own, interpreted on a CPU."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "conv_kernel": kernel}
    model = make_model(cell=cell, **sizes).float().to(device)
    decoders = [Decoder(model, 1, compiled=compiled) for compiled in (False, True)]
    tokens = [decoder.generate(PROMPTS[:1], max_new_tokens=5) for decoder in decoders]
    assert tokens[0] == tokens[1]
    assert_same_states(*decoders, rtol=1e-5)


def assert_same_states(expected, found, rtol):
    states = [recurrent(decoder._states.layers) for decoder in (expected, found)]
    for i, (one, other) in enumerate(zip(*states, strict=True)):
        if one.numel():
            assert_close(f"state {i}", other, one, rtol=rtol)


def error(decoder, exact):
    """Of all states, relative, root of the mean square."""
    found, wanted = (
        torch.cat([t.double().flatten() for t in recurrent(d._states.layers)])
        for d in (decoder, exact)
    )
    return ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()


class Counted(FuseMatvecs):
    """Counts what is left of a step."""

    def __call__(self, graph):
        super().__call__(graph)
        graph.eliminate_dead_code()
        names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        found = graph.find_nodes(op="call_function", target=torch.ops.pararnn.matvec.default)
        self.weights = {matrix.meta["val"].dtype for node in found for matrix in node.args[1]}
        self.products = names.count("pararnn.matvec.default")
        watched = "aten.mm", "aten.bmm", "aten.embedding", "pararnn"
        self.others = {name for name in names if name.startswith(watched)}

    def uuid(self):
        return None


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("cell", "texts"), [("paragru", 1), ("paragru", 2), ("paralstm", 2)])
def test_a_compiled_step_of_few_texts(make_model, cell, texts, device, monkeypatch):
    """Five products for each block and one for the head, in half precision, and nothing else.

    In float16: the interpreter does not round to the nearest bfloat16.
    """
    fusion = Counted()
    options = {"post_grad_custom_post_pass": fusion}
    monkeypatch.setattr(generation, "compile_options", lambda: options)
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    model = make_model(cell=cell, **sizes).half().to(device)
    prompts = (PROMPTS * 3)[:texts]
    exact = copy.deepcopy(model).double()
    decoders = Decoder(exact, texts), Decoder(model, texts), Decoder(model, texts, compiled=True)
    for decoder in decoders:
        decoder.start(prompts)
    for _ in range(2):
        for decoder in decoders:
            decoder.step()
            decoder.tokens.copy_(decoders[0].tokens)
    plain, compiled = (error(decoder, decoders[0]) for decoder in decoders[1:])
    assert 0 < compiled < 1.2 * plain < 0.1  # as near to float64 as PyTorch's own operations
    assert fusion.products == 5 * 2 + 1
    assert fusion.others == {"pararnn.matvec.default"}


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
def test_a_compiled_step_of_more_texts_has_the_products_of_pytorch(make_model, monkeypatch):
    fusion = Counted()
    options = {"post_grad_custom_post_pass": fusion}
    monkeypatch.setattr(generation, "compile_options", lambda: options)
    texts = COSTS.matvec_most_texts + 1
    model = make_model(hidden_size=32, intermediate_size=48)
    plain, compiled = Decoder(model, texts), Decoder(model, texts, compiled=True)
    for decoder in (plain, compiled):
        decoder.start((PROMPTS * 3)[:texts])
        decoder.step()
    assert torch.equal(plain.tokens, compiled.tokens)
    assert fusion.products == 0
    assert "pararnn.matvec.default" not in fusion.others


def test_end_of_text(make_model, monkeypatch):
    model = make_model()
    free = generate(model, PROMPTS, max_new_tokens=20)
    end = free[0][6]
    ended = generate(model, PROMPTS, max_new_tokens=20, end_of_text=end)
    assert ended == [row[: row.index(end)] if end in row else row for row in free]
    assert len(ended[0]) < 20
    monkeypatch.setattr(generation, "COSTS", replace(COSTS, steps_between_checks=4))
    decoder = Decoder(model, 1)
    assert decoder.generate(PROMPTS[:1], max_new_tokens=20, end_of_text=end) == ended[:1]


def test_it_stops_when_all_have_ended(make_model, monkeypatch):
    model, steps = make_model(), []
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits equal: token 0 is chosen
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: steps.append(1) or step(self))
    assert generate(model, PROMPTS, max_new_tokens=500, end_of_text=0) == [[], [], []]
    assert len(steps) == COSTS.steps_between_checks - 1


def test_sampling_has_the_probabilities_of_the_model(make_model):
    model = make_model()
    prompt, count, temperature = PROMPTS[0], 4000, 0.8
    logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits / temperature, dim=0)
    rows = generate(model, [prompt] * count, max_new_tokens=1, temperature=temperature, seed=4)
    found = torch.tensor(rows).flatten().bincount(minlength=17) / count
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 5 * spread + 1e-3).all()


def test_seed_decides_and_the_global_state_is_left_alone(make_model):
    model = make_model()
    before = torch.get_rng_state()
    settings = {"max_new_tokens": 30, "temperature": 1.0}
    first, again, other = (generate(model, PROMPTS, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "batch_size is 0; pass at least one prompt"),
        ([[1], []], {}, "prompt 1 is empty; begin it with the token that begins a text"),
        ([[1, 17]], {}, "hold tokens from 1 to 17 but the model has 17; encode them with"),
        ([[1, -1]], {}, "hold tokens from -1 to 1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5; it must be at least 0"),
        (
            [[1]],
            {"temperature": float("nan")},
            "temperature is nan; it must be at least 0",
        ),
        (
            [[1]],
            {"temperature": float("inf")},
            "temperature is inf; it must be .*, and finite",
        ),
    ],
)
def test_refused(make_model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), prompts, **{"max_new_tokens": 3, **settings})
    if prompts and not settings:
        with pytest.raises(
            ValueError, match=rf"got {len(prompts)} prompts? but batch_size is 5; pass"
        ):
            Decoder(make_model(), 5).start(prompts)
