"""Decoders that go back, branch, begin after a prefix, and hand out tokens as they come."""

import copy
from dataclasses import replace

import pytest
import torch

from pararnn.lm.decoding import Decoder, decoder
from pararnn.planning.costs import COSTS

from .test_mixers import MIXERS, memory_options, tiny

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9]]
SAMPLED = {"temperature": 1.0, "seed": 3}


@pytest.fixture(params=MIXERS, scope="module")
def model(request):
    name, options = MIXERS[request.param]
    return tiny(
        num_hidden_layers=3,
        mixers=[name, "paralstm", name],
        attention_heads=2,
        memory_options=memory_options(name, **options),
    )


@pytest.fixture
def hybrid():
    return tiny(num_hidden_layers=2, mixers=["paragru", "attention"], attention_heads=2)


def steps(decoding, count):
    """The tokens of so many steps, and all states after them."""
    tokens = []
    for _ in range(count):
        decoding.step()
        tokens.append(decoding.tokens.clone())
    return torch.cat(tokens, 1), tensors(decoding.snapshot())


def tensors(snapshot):
    found = [snapshot.tokens, snapshot.ended]
    for layer in snapshot.layers:
        layer.map(lambda t: found.append(t) or t)
    return found


def assert_same_bits(found, expected):
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_restored_is_as_if_nothing_had_happened(model, settings):
    """In the same decoder, after other texts, and in another one."""
    one = Decoder(model, 3)
    one.start(PROMPTS, end_of_text=0, **settings)
    steps(one, 3)
    kept = one.snapshot()
    expected = steps(one, 9)
    before = [t.clone() for t in tensors(kept)]
    one.generate(PROMPTS[::-1], max_new_tokens=5, temperature=2.0, end_of_text=7)
    for again in (one, Decoder(model, 3)):
        again.restore(kept)
        assert_same_bits(steps(again, 9), expected)
    assert all(map(torch.equal, tensors(kept), before))  # nothing writes into a snapshot


def test_a_branch_equals_the_text_alone(model):
    """A text in several rows, and texts in another order."""
    three = Decoder(model, 3)
    three.start(PROMPTS)
    kept = three.snapshot()
    expected = steps(three, 8)[0]
    order = [2, 0, 2, 1]
    branched = Decoder(model, 4)
    branched.restore(kept.select(torch.tensor(order)))
    found, states = steps(branched, 8)
    assert torch.equal(found, expected[order])
    for few in (range(1, 3), (1, 2)):
        assert torch.equal(kept.select(few).tokens, kept.tokens[1:])
    for state in states:
        assert torch.equal(state[0], state[2])


def test_branches_sample_other_texts(hybrid):
    decoding = Decoder(hybrid, 2)
    decoding.start([PROMPTS[0]] * 2, **SAMPLED)
    kept = decoding.snapshot()
    same, again, other = [], [], []
    for seed, texts in ((None, same), (None, again), (5, other)):
        decoding.restore(kept, seed=seed)
        texts.append(steps(decoding, 20)[0])
    assert torch.equal(same[0], again[0])
    assert not torch.equal(same[0], other[0])
    assert not torch.equal(same[0][0], same[0][1])


def test_prompts_after_a_prefix_are_the_whole_text(model):
    """The prefix is read once, by a decoder of one text; then by itself and by one of three."""
    prefix = [7, 7, 2, 11, 4]
    one = Decoder(model, 1)
    one.start([prefix])
    kept = one.snapshot()
    ends = [prompt[-1:] for prompt in PROMPTS] if has_attention(model) else PROMPTS
    expected = [one.generate([prefix + end], max_new_tokens=9)[0] for end in ends]
    assert Decoder(model, 3).generate(ends, max_new_tokens=9, after=kept) == expected
    assert one.generate(ends[:1], max_new_tokens=9, after=kept) == expected[:1]
    three = Decoder(model, 3)
    three.start([prefix] * 3)
    assert three.generate(ends, max_new_tokens=9, after=three.snapshot()) == expected


def has_attention(model):
    return "attention" in model.config.mixers


def test_a_conversation_goes_on_after_what_was_generated(hybrid):
    decoding = Decoder(hybrid, 1)
    first = decoding.generate([[3, 1, 4]], max_new_tokens=6)[0]
    turn = [int(decoding.tokens), 9, 2]  # the last token was chosen but not read
    whole = Decoder(hybrid, 1).generate([[3, 1, 4, *first, 9, 2]], max_new_tokens=6)
    assert decoding.generate([turn], max_new_tokens=6, after=decoding.snapshot()) == whole


def test_a_snapshot_of_a_recurrent_model_does_not_grow(tmp_path):
    model = tiny(num_hidden_layers=2)
    decoding, sizes = Decoder(model, 1), []
    for prompt in ([3], [3] * 50):
        decoding.start([prompt])
        sizes.append(decoding.snapshot().nbytes)
    assert sizes[0] == sizes[1] == decoding.state_bytes
    kept = decoding.snapshot()
    torch.save(kept, tmp_path / "prefix.pt")
    loaded = torch.load(tmp_path / "prefix.pt", weights_only=False)
    expected = decoding.generate([[5]], max_new_tokens=8, after=kept)
    assert decoding.generate([[5]], max_new_tokens=8, after=loaded) == expected


def test_snapshots_where_the_room_for_attention_grows(hybrid, monkeypatch):
    """Growing keeps tokens, ended texts and the noise."""
    decoding = Decoder(hybrid, 3)
    decoding.start(PROMPTS, end_of_text=2, **SAMPLED)
    expected = steps(decoding, 40)
    monkeypatch.setattr(decoder, "COSTS", replace(COSTS, attention_room=8))
    small = Decoder(hybrid, 3)
    small.start(PROMPTS, end_of_text=2, **SAMPLED)
    assert torch.equal(steps(small, 40)[0], expected[0])
    assert small._states.room == 64
    kept = small.snapshot()
    small.start(PROMPTS)
    small.restore(kept)
    assert torch.equal(steps(small, 20)[0], steps(decoding, 20)[0])


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_yields_what_generate_returns(model, settings):
    settings = {"max_new_tokens": 24, **settings}
    decoding = Decoder(model, 3)
    end = decoding.generate(PROMPTS, **settings)[0][5]
    for end_of_text in (None, end):
        expected = decoding.generate(PROMPTS, end_of_text=end_of_text, **settings)
        seen = list(decoding.stream(PROMPTS, end_of_text=end_of_text, **settings))
        found = [[row[i] for row in seen if row[i] is not None] for i in range(3)]
        assert found == expected


def test_a_stream_ends_when_all_texts_have_and_comes_one_by_one(monkeypatch):
    model, taken = tiny(), []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: taken.append(1) or step(self))
    stream = Decoder(model, 1).stream([[3]], max_new_tokens=50)
    first = next(stream)
    assert len(taken) == 1  # one step ahead
    assert first == [Decoder(model, 1).generate([[3]], max_new_tokens=1)[0][0]]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # token 0 is chosen
    assert list(Decoder(model, 1).stream([[3]], max_new_tokens=50, end_of_text=0)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["paragru", "m2rnn", "gated-deltanet", "attention"])
def test_captured_steps_go_back_and_stream(mixer, monkeypatch):
    """Steps are CUDA graphs, tokens are copied to the host beside them, and the room grows."""
    monkeypatch.setattr(decoder, "COSTS", replace(COSTS, attention_room=16))
    sizes = {"key_size": 16, "value_size": 16}
    options = {"memory_options": memory_options(mixer, **sizes), "attention_heads": 2}
    sizes = {"hidden_size": 32, "mixers": [mixer, "paralstm"]}
    model = tiny(**sizes, **options).float().to("cuda")
    decoding = Decoder(model, 3)
    expected = decoding.generate(PROMPTS, max_new_tokens=24, **SAMPLED)
    assert decoding.generate(PROMPTS, max_new_tokens=24, **SAMPLED) == expected
    rows = list(decoding.stream(PROMPTS, max_new_tokens=24, **SAMPLED))
    assert [list(tokens) for tokens in zip(*rows, strict=True)] == expected
    decoding.start(PROMPTS, **SAMPLED)
    steps(decoding, 3)
    kept = decoding.snapshot()
    after = steps(decoding, 9)
    decoding.generate(PROMPTS[::-1], max_new_tokens=5)
    decoding.restore(kept)
    assert_same_bits(steps(decoding, 9), after)


def test_refused(hybrid):
    decoding = Decoder(hybrid, 2)
    for early in (decoding.step, decoding.snapshot):
        with pytest.raises(RuntimeError, match="has read nothing; call start or restore first"):
            early()
    decoding.start([[1], [2]])
    kept = decoding.snapshot()
    with pytest.raises(ValueError, match=r"snapshot has 2 texts but batch_size is 3; pick or"):
        Decoder(hybrid, 3).restore(kept)
    with pytest.raises(ValueError, match=r"after has 2 texts for 3 prompts; pass a"):
        Decoder(hybrid, 3).start(PROMPTS, after=kept)
    with pytest.raises(ValueError, match=r"prompts have 1 to 2 tokens, .* of one length"):
        decoding.start([[1], [2, 3]], after=kept)
    for texts in ([2], [-1], [], torch.tensor([0, 2])):
        with pytest.raises(IndexError, match="the snapshot has texts 0 to 1; name at least one"):
            kept.select(texts)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        decoding.stream([[1], [2]], max_new_tokens=0)


OTHER = {
    "blocks": ({"num_hidden_layers": 3}, "is of a model with 2 blocks but this one has 3; make a"),
    "fewer": ({"num_hidden_layers": 1}, "is of a model with 2 blocks but this one has 1; make a"),
    "width": ({"hidden_size": 16}, "block 0 has a state of shape .* in it but a state of shape"),
    "convolution": ({"conv_kernel": 3}, "block 0 has .* convolution of shape .* in it but"),
    "cell": ({"mixers": ["paralstm", "attention"]}, "block 0 has a state of .* but a state of"),
    "mixer": ({"mixers": ["paragru", "paragru"]}, "block 1 has attention with 2 heads of .* but a"),
    "heads": (
        {"attention_heads": 4},
        "block 1 has attention with 2 heads of .* but attention",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_snapshot_of_another_model_is_refused(hybrid, name):
    changes, message = OTHER[name]
    options = {"num_hidden_layers": 2, "mixers": ["paragru", "attention"], "attention_heads": 2}
    options |= changes
    count = options["num_hidden_layers"]
    options["mixers"] = [*options["mixers"], "paragru"][:count]
    one, other = Decoder(hybrid, 1), Decoder(tiny(**options), 1)
    one.start([[1, 2, 3]])
    kept = one.snapshot()
    for begun in range(2):  # new, and after a text
        with pytest.raises(ValueError, match=f"^the snapshot .*{message}"):
            other.restore(kept)
        with pytest.raises(ValueError, match=f"^after .*{message}"):
            other.start([[1]], after=kept)
        if not begun:
            other.start([[1, 2]])
    expected = Decoder(tiny(**options), 1).generate([[5]], max_new_tokens=3)
    assert other.generate([[5]], max_new_tokens=3) == expected  # it still works


def test_a_snapshot_of_other_tokens_is_refused(hybrid):
    one = Decoder(hybrid, 1)
    one.start([[1, 2, 3]])
    more = replace(one.snapshot(), vocab_size=hybrid.config.vocab_size + 1)
    with pytest.raises(ValueError, match=r"is of a model with .* tokens but this one has"):
        one.restore(more)
    one.restore(replace(more, vocab_size=1))  # the vocabulary may grow


def test_a_snapshot_with_the_noise_of_another_device_needs_a_seed(hybrid):
    one = Decoder(hybrid, 1)
    one.start([[1, 2, 3]], **SAMPLED)
    other = replace(one.snapshot(), random=torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="another kind of device than cpu; pass seed="):
        one.restore(other)
    one.restore(other, seed=1)
    found = steps(one, 3)
    one.restore(replace(other, random=torch.Generator().get_state()), seed=1)
    assert_same_bits(steps(one, 3), found)


def test_a_snapshot_of_another_type_is_taken_over(hybrid):
    one = Decoder(hybrid, 2)
    one.start([[1, 2, 3], [4]])
    kept = one.snapshot()
    double = copy.deepcopy(hybrid).to(torch.float32)
    other = Decoder(double, 2)
    other.restore(kept)
    other.step()
    wanted = [t.dtype for t in tensors(_after_one_token(double))]
    assert [t.dtype for t in tensors(other.snapshot())] == wanted


def _after_one_token(model):
    decoding = Decoder(model, 2)
    decoding.start([[1], [1]])
    return decoding.snapshot()


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)


@pytest.mark.parametrize("one", MODES)
@pytest.mark.parametrize("other", MODES)
def test_calls_in_and_out_of_inference_mode(hybrid, one, other):
    expected = Decoder(hybrid, 2)
    expected.start([[1, 2], [3]], **SAMPLED)
    wanted = steps(expected, 3)
    with one():
        decoding = Decoder(hybrid, 2)
        decoding.start([[4], [5, 6]])
        decoding.step()
    with other():
        decoding.start([[1, 2], [3]], **SAMPLED)
        kept = decoding.snapshot().select([0, 1])
        decoding.step()
    with one():
        decoding.restore(kept)
        decoding.step()
    with other():
        again = steps(decoding, 2)
    with one():
        decoding.start([[1], [2]], after=kept)
        assert not decoding.tokens.is_inference()
    assert torch.equal(again[0], wanted[0][:, 1:])
    for found, right in zip(again[1][2:], wanted[1][2:], strict=True):
        assert torch.equal(found, right)
        assert not found.is_inference()
        assert not found.requires_grad
