"""Metrics, evaluation, comparison with the step-by-step model, signals, environment."""

import functools
import json
import math
import os
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pararnn.lm.data.signals import StopSignals
from pararnn.lm.decoding import Decoder, StepChoice
from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.lm.training import language_model
from pararnn.lm.training.comparison import compare_train_steps, step_by_step
from pararnn.lm.training.environment import describe_environment
from pararnn.lm.training.evaluation import evaluate
from pararnn.lm.training.language_model import generate_text, stream_text
from pararnn.lm.training.metrics import MetricsFile, plot_loss, read_metrics
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.text import Codec

from .conftest import byte_split


@pytest.fixture
def model():
    shape = ParaRNNConfig(vocab_size=256, hidden_size=8, num_hidden_layers=2, num_heads=2)
    return ParaRNNForCausalLM(shape)


def test_metrics_go_on_after_the_last_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    metrics = MetricsFile(path, 3)
    metrics.write({"step": 4, "loss": 0.25})
    metrics.sync()
    metrics.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert json.loads(lines[2])["loss"] == 1 / 3


def test_plot(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1, "bits_per_byte": 8.0}\n{"step": 2, "bits_per_byte": 7.5}\n')
    assert plot_loss(run)
    assert run.plot.read_bytes().startswith(b"\x89PNG")
    run.plot.unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plot_loss(run)
    assert not run.plot.exists()


@pytest.fixture
def split_of(tmp_path):
    """Makes a split of so many bytes, a document every 700."""

    def make(num_bytes):
        flat = torch.randint(1, 256, (num_bytes,)).to(torch.uint8).numpy()
        flat[::700] = 0
        (tmp_path / "flat.bin").write_bytes(flat.tobytes())
        return byte_split(tmp_path / "flat.bin")

    return make


@pytest.mark.parametrize("chunk", [64, 512])
def test_evaluation_of_one_stream_is_the_mean_loss(model, chunk, split_of):
    split = split_of(1500)
    tokens = torch.from_numpy(split.read(0, 1500)).unsqueeze(0)
    model.eval()
    with torch.no_grad():
        output = model(tokens[:, :-1], shift_labels=tokens[:, 1:], resets=tokens[:, :-1] == 0)
    result = evaluate(model.train(), split, Codec(), chunk=chunk)
    assert result.num_tokens == 1499
    assert result.loss == pytest.approx(output.cross_entropy.item(), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))
    assert model.training


def test_stacks_with_attention_begin_every_chunk_anew(split_of):
    shape = ParaRNNConfig(
        vocab_size=256,
        hidden_size=8,
        num_hidden_layers=2,
        num_heads=2,
        mixers=["paragru", "attention"],
    )
    model, split = ParaRNNForCausalLM(shape), split_of(1500)
    anew, carried = (evaluate(model, split, Codec(), chunk=64, carry=c).loss for c in (False, True))
    assert carried == anew


@pytest.mark.parametrize("num_bytes", [2, 3, 2049, 4097, 10_001])
def test_every_byte_is_predicted_once(model, num_bytes, split_of):
    assert evaluate(model, split_of(num_bytes), Codec()).num_tokens == num_bytes - 1


def test_evaluation_of_a_part(model, split_of):
    split = split_of(10_000)
    assert evaluate(model, split, Codec(), limit=1000).num_tokens == 1000
    assert evaluate(model, split, Codec(), limit=10**6).num_tokens == 9999


@pytest.mark.parametrize("cell", ["paragru", "paralstm"])
def test_step_by_step_is_the_same_model(cell):
    shape = ParaRNNConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_heads=2, cell=cell)
    model = ParaRNNForCausalLM(shape).double()
    loop = step_by_step(model)
    tokens = torch.randint(1, 9, (2, 13))
    resets = torch.rand(2, 13) < 0.2
    losses = [m(tokens, labels=tokens, resets=resets).loss for m in (model, loop)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0.0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_comparison_leaves_the_model_alone(model):
    before = [p.clone() for p in model.parameters()]

    def prepare(copied):
        assert all(p is not q for p, q in zip(copied.parameters(), model.parameters(), strict=True))
        tokens = torch.randint(1, 256, (2, 9))

        def step():
            copied(tokens, labels=tokens).loss.backward()
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.zero_()

        return step

    times = compare_train_steps(model, prepare)
    assert times.parallel_s > 0
    assert times.ratio == pytest.approx(times.sequential_s / times.parallel_s)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_text_and_tokens():
    codec = Codec()
    assert codec.encode("hé").tolist() == [[0, 104, 195, 169]]
    assert codec.decode(torch.tensor([0, 104, 195, 169, 0])) == "hé"
    assert codec.decode(torch.tensor([0, 195, 104])) == "\ufffdh"


def test_generated_text_depends_on_the_seed_alone(model):
    with torch.no_grad():
        model.lm_head.weight.normal_()
    state = torch.get_rng_state()
    generate = functools.partial(generate_text, model, Codec())
    texts = [generate("ab", num_tokens=30, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("ab") for text in texts)
    assert torch.equal(torch.get_rng_state(), state)
    greedy = {generate("", num_tokens=9, temperature=0, seed=s) for s in (1, 2)}
    assert len(greedy) == 1


def test_text_comes_in_pieces(model, monkeypatch):
    """Of whole characters; the first when one token has been chosen."""
    with torch.no_grad():
        model.lm_head.weight.normal_()
    taken, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: taken.append(1) or step(self))
    settings = {"num_tokens": 200, "seed": 4}
    whole = generate_text(model, Codec(), "hé", **settings)
    taken.clear()
    pieces = stream_text(model, Codec(), "hé", **settings)
    assert [next(pieces), next(pieces), len(taken)] == ["h", "é", 0]
    rest = next(pieces)
    assert 0 < len(taken) < 10
    assert "hé" + rest + "".join(pieces) == whole


@pytest.mark.parametrize("seed", range(5))
def test_decoded_piece_by_piece(seed):
    """Characters of several bytes, halves of them, bytes that are none, and separators."""
    generator = random.Random(seed)
    parts = [b"a", b" b", "é".encode(), "語".encode(), "🐦".encode(), "�".encode()]
    parts += [b"\xe8\xaa", b"\xff", b"\x80", b"\x00", b"\n"]
    tokens = list(b"".join(generator.choices(parts, k=60)))
    pieces = list(Codec().decode_stream(tokens))
    assert "".join(pieces) == Codec().decode(torch.tensor(tokens))
    assert len(pieces) > 20
    assert list(Codec().decode_stream([])) == list(Codec().decode_stream([0])) == []


def test_a_long_text_is_generated_by_a_compiled_step(model, monkeypatch):
    """The choice is that of `choose_step`, and its reason is told."""
    made, said = [], []
    monkeypatch.setattr(language_model, "warn", said.append)
    chosen = StepChoice(True, "it is long")
    monkeypatch.setattr(language_model, "choose_step", lambda *given: made.append(given) or chosen)
    real = language_model.Decoder
    monkeypatch.setattr(
        language_model, "Decoder", lambda *given, compiled: made.append(compiled) or real(*given)
    )
    generate_text(model, Codec(), "ab", num_tokens=3)
    assert made == [("cpu", 2, 3), True]
    assert said == ["The step of generation is compiled: it is long."]


@pytest.fixture
def interrupt_handler():
    """Python's own handler, also where the tests were started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_first_signal_is_noted_and_the_second_raises(interrupt_handler):
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is interrupt_handler


def test_one_among_many_notes_signals_until_it_has_said_why_it_ends(interrupt_handler):
    """`torchrun` sends them when another process fails, and once more what a terminal has sent."""
    with StopSignals(by_torchrun=True):
        pass
    assert signal.getsignal(signal.SIGINT) is interrupt_handler
    failed, stopped = StopSignals(by_torchrun=True), StopSignals(by_torchrun=True)
    with pytest.raises(ValueError, match="lost"), failed:
        raise ValueError("lost")
    os.kill(os.getpid(), signal.SIGINT)
    assert failed.received == signal.SIGINT
    with stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    assert stopped.received == signal.SIGINT


def test_a_thread_that_is_not_the_first_leaves_signals_alone(interrupt_handler):
    def wait():
        with StopSignals() as stop:
            return stop.received, signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(wait).result() == (None, interrupt_handler)


def test_environment_names_versions():
    lines = describe_environment(torch.device("cpu")).splitlines()
    facts = dict(line.split(": ", 1) for line in lines)
    assert facts["torch"] == torch.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["device"] == "cpu"
