"""`pararnn bench decode` and `train` at toy size on the CPU, and what they compute from it."""

import json

import pytest
import torch

from pararnn.cli.bench import DecodeArguments
from pararnn.cli.main import main
from pararnn.lm.bench import decode, train
from pararnn.lm.bench.models import ModelSize
from pararnn.lm.data.errors import RunError
from pararnn.lm.models.flops import multiplied_parameters, peak_flops, train_flops_per_token
from pararnn.lm.models.presets import ARCHITECTURES
from pararnn.lm.training.config import ExecutionConfig
from pararnn.lm.training.parallel import Processes

CPU = torch.device("cpu")
HERE = Processes(0, 1, CPU)
SIZE = ModelSize(width=64, num_layers=2, vocab_size=256)
MEMORY = ["--architectures", "m2rnn", "--memory-options"]
TINY = "--width 64 --layers 2 --vocab-size 256 --device cpu".split()


@pytest.fixture
def once(monkeypatch):
    """Steps are run once and said to take 2 milliseconds."""

    def steps_milliseconds(run, device):
        run()
        return 2.0

    for module in (decode, train):
        monkeypatch.setattr(module, "steps_milliseconds", steps_milliseconds)


@pytest.mark.parametrize("architecture", ["paragru", "paralstm", "transformer"])
def test_flops_count_the_matrix_products(architecture):
    """Against PyTorch's own counter; Mamba2's slow path writes its scan as products as well."""
    from torch.utils.flop_counter import FlopCounterMode

    time = 32
    model = SIZE.build(architecture, CPU, torch.float32, time)
    if architecture == "transformer":
        model.set_attn_implementation("eager")
    tokens = torch.randint(256, (2, time))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    counted = train_flops_per_token(model, time) * tokens.numel()
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_of_attention_and_of_tied_embeddings():
    model = SIZE.build("transformer", CPU, torch.float32, 32)
    attention = train_flops_per_token(model, 200) - train_flops_per_token(model, 100)
    assert attention == 12 * 2 * 64 * 100
    for name in ("paragru", "paralstm", "mamba2"):
        other = SIZE.build(name, CPU, torch.float32, 32)
        assert train_flops_per_token(other, 200) == train_flops_per_token(other, 100)
    free = multiplied_parameters(model)
    assert free == sum(p.numel() for p in model.parameters()) - 256 * 64
    model.lm_head.weight = model.model.embed_tokens.weight
    assert multiplied_parameters(model) == free


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", None),
    ],
)
def test_peak_is_known_by_the_name_of_the_gpu(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(CPU) is None


def test_size():
    assert str(ModelSize()) == "preset 1b"
    assert str(SIZE) == "preset 1b, width 64, layers 2, vocabulary 256"
    for name in ARCHITECTURES:
        model = SIZE.build(name, CPU, torch.bfloat16, 8)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 256)


def test_decode_rows(once):
    rows = list(decode.decode_rows(SIZE, ARCHITECTURES, [1, 2], [32, 64], CPU, rate=10.0))
    transformer = [row for row in rows if row["architecture"] == "transformer"]
    assert [(row["batch"], row["context"]) for row in transformer] == [
        (1, 32),
        (1, 64),
        (2, 32),
        (2, 64),
    ]
    assert len(rows) == 4 + 3 * 2
    for row in transformer:  # keys and values of 2 layers of 64 channels, two bytes each
        assert row["state_bytes"] == 2 * 2 * 64 * 2 * row["batch"] * row["context"]
    for row in rows:
        assert row["token_ms"] == 2.0 / 16
        assert row["tokens_per_second"] == row["batch"] * 8000
        bytes_moved = row["weight_bytes"] + row["state_bytes"]
        assert row["limit_ms"] == pytest.approx(bytes_moved / 10e6)
        assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["token_ms"])
    states = {row["architecture"]: row["state_bytes"] for row in rows if row["batch"] == 1}
    assert states["paragru"] == 2 * 2 * (3 + 1) * 64 * 2  # window of 3 and state, read and written
    assert states["paralstm"] == 2 * 2 * (3 + 2) * 64 * 2


def test_decode_with_int8_weights(once):
    """For models with cells: a byte for each weight of a projection, four for each channel."""
    rows = list(
        decode.decode_rows(SIZE, ARCHITECTURES, [1], [32], CPU, 10.0, weights=["stored", "int8"])
    )
    found = {(row["architecture"], row["weights"]): row["weight_bytes"] for row in rows}
    assert set(found) == {(name, "stored") for name in ARCHITECTURES} | {
        (name, "int8") for name in ("paragru", "paralstm")
    }
    model = SIZE.build("paragru", CPU, torch.bfloat16, 8)
    projections = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    saved = sum(weight.numel() - 4 * len(weight) for weight in projections)
    assert found["paragru", "int8"] == found["paragru", "stored"] - saved


def test_decode_of_the_transformer_stays_at_its_context(monkeypatch):
    """However often it is timed, the cache holds the context and the steps of one run."""
    model = SIZE.build("transformer", CPU, torch.float32, 64)
    caches, make = [], decode.StaticCache
    monkeypatch.setattr(decode, "StaticCache", lambda **o: caches.append(make(**o)) or caches[-1])
    run, _ = decode._steps(model, 1, 32, compiled=False)
    for _ in range(3):
        run()
        assert caches[0].get_seq_length() == 32 + 16
        assert caches[0].layers[0].max_cache_len == 32 + 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_train_row(once, architecture):
    (row,) = train.train_rows(SIZE, [architecture], 2, 16, HERE)
    assert row["tokens_per_second"] == 16_000
    assert row["step_ms"] == 2.0
    assert row["mfu"] is None
    assert not row["checkpointing"]
    assert ("mamba-ssm" in row["note"]) == (architecture == "mamba2")


@pytest.mark.parametrize("architecture", ["paragru", "transformer"])
def test_train_steps_learn_with_and_without_checkpointing(architecture, monkeypatch):
    losses = []
    forward = train.CausalLoss.forward

    def spy(self, *arguments):
        result = forward(self, *arguments)
        losses.append(result[0].item())
        return result

    monkeypatch.setattr(train.CausalLoss, "forward", spy)
    for checkpointing in ("off", "on"):
        torch.manual_seed(0)
        execution = ExecutionConfig(activation_checkpointing=checkpointing)
        train.measure(SIZE, architecture, 2, 16, HERE, execution)
    without, with_it = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert without[-1] < without[0]
    assert with_it == pytest.approx(without, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
def test_on_a_gpu():
    """Compiled, captured and profiled."""
    gpu = torch.device("cuda")
    for row in decode.decode_rows(SIZE, ARCHITECTURES, [2], [64], gpu, rate=1000.0):
        assert 0 < row["share_of_limit"] < 1
    for row in train.train_rows(SIZE, ARCHITECTURES, 2, 64, Processes(0, 1, gpu)):
        assert row["peak_memory_gib"] > 0
        assert 0 < row["kernels_ms"] < 1.1 * row["step_ms"]
        assert (row["recurrence_share"] > 0) == row["architecture"].startswith("para")


def test_one_that_fails_does_not_take_the_others_along(monkeypatch):
    def measure(size, architecture, *rest):
        if architecture == "mamba2":
            raise RuntimeError("it does not compile\nfor a long reason")
        return {"step_ms": 1.0}

    monkeypatch.setattr(train, "measure", measure)
    rows = list(train.train_rows(SIZE, ["mamba2", "paragru"], 2, 16, HERE))
    assert rows[0]["skipped"] == "RuntimeError: it does not compile"
    assert rows[1]["step_ms"] == 1.0


def test_kernels_that_overlap_count_once():
    assert train.covered([(4, 6), (0, 2), (1, 3), (1, 2)]) == 5
    spans = [(0, 2000, "sweep"), (1000, 3000, "mm"), (5000, 6000, "mm"), (5500, 6000, "correct")]
    assert train.kernel_times(spans) == {"kernels_ms": 4.0, "recurrence_share": 2500 / 4000}
    assert train.kernel_times([]) == {"kernels_ms": None, "recurrence_share": None}


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        ((2, "off"), {"checkpointing": False, "batch": 2, "step_ms": 1.0}),
        ((1, "off"), {"checkpointing": False, "batch": 1, "note": "1 sequence, since 2 do not"}),
        ((2, "on"), {"checkpointing": True, "batch": 2, "note": ""}),
        (None, {"skipped": "out of memory, with activation checkpointing too", "batch": 2}),
    ],
)
def test_out_of_memory_is_tried_with_half_and_with_checkpointing(monkeypatch, fits, expected):
    def measure(size, architecture, batch, time, processes, execution):
        if (batch, execution.activation_checkpointing) == fits:
            return {"step_ms": 1.0}
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "measure", measure)
    (row,) = train.train_rows(SIZE, ["paragru"], 2, 16, HERE)
    note = expected.pop("note", "")
    assert row.items() >= expected.items()
    assert row["note"].startswith(note)


@pytest.mark.parametrize("runs", [True, False])
def test_one_that_does_not_compile_runs_as_it_is(monkeypatch, runs):
    tried = []

    def measure(size, architecture, batch, time, processes, execution):
        tried.append((batch, execution.compile))
        if batch == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if execution.compile or not runs:
            raise TypeError("cannot be compiled\nsince it is odd")
        return {"step_ms": 1.0}

    monkeypatch.setattr(train, "measure", measure)
    (row,) = train.train_rows(SIZE, ["paragru"], 4, 16, Processes(0, 1, torch.device("cuda")))
    assert tried == [(4, True), (2, True), (2, False)]
    reason = "TypeError: cannot be compiled"
    assert f"do not compile ({reason})" in row["note"]
    assert row["skipped"] == reason if not runs else "2 sequences, since 4 do not" in row["note"]


def test_commands_write_tables(tmp_path, capsys, monkeypatch, once):
    monkeypatch.chdir(tmp_path)
    arguments = ["--batch-sizes", "1", "--contexts", "32", "1024", *TINY]
    assert main(["bench", "decode", "--out", "tables", *arguments]) == 0
    arguments = ["--architectures", "paragru", "--batch-size", "2", "--sequence-length", "16"]
    assert main(["bench", "train", "--out", "tables", *arguments, *TINY]) == 0
    printed = capsys.readouterr().out
    assert "decode architecture=transformer weights=stored batch=1 context=1024" in printed
    assert "Written to tables/train.md" in printed
    table = (tmp_path / "tables/decode.md").read_text()
    assert "| transformer | stored | 1 | 1,024 | 8,000 | 0.125 |" in table
    assert "| paragru | stored | 1 | any | 8,000 | 0.125 |" in table
    assert "`pararnn bench decode --out tables --batch-sizes 1 --contexts 32 1024" in table
    assert "preset 1b, width 64, layers 2, vocabulary 256" in table
    assert "Note: mamba2: transformers' slow path: mamba-ssm is not installed." in table
    stored = json.loads((tmp_path / "tables/train.json").read_text())
    assert stored["rows"][0]["tokens_per_second"] == 16_000
    assert stored["facts"]["torch"] == torch.__version__
    table = (tmp_path / "tables/train.md").read_text()
    assert "| paragru | 163,776 | 2 | 16 | 16,000 | 2.0 |  |  |  | no |  |" in table


@pytest.mark.parametrize(
    ("command", "sizes"),
    [
        ("train", ["--batch-size", "2", "--sequence-length", "16"]),
        ("decode", ["--batch-sizes", "1", "--contexts", "32"]),
    ],
)
def test_options_of_memories(tmp_path, once, command, sizes):
    """They reach the models that have a memory, and the table says them."""
    given = ["--architectures", "m2rnn+paragru", "transformer", *sizes, *TINY]
    rows = []
    for options in ([], ["--memory-options", "key_size=8", "nonlinearity=linear"]):
        assert main(["bench", command, "--out", str(tmp_path), *given, *options]) == 0
        rows.append(json.loads((tmp_path / f"{command}.json").read_text())["rows"])
    (default, other), (fewer, same) = rows
    assert "skipped" not in default | fewer | same
    size = "parameters" if command == "train" else "state_bytes"
    assert fewer[size] < default[size]
    assert same[size] == other[size]
    head = (tmp_path / f"{command}.md").read_text()
    assert "preset 1b, width 64, layers 2, vocabulary 256, key_size=8, nonlinearity=linear" in head


def test_generation_is_timed_in_one_process():
    with pytest.raises(RunError, match="runs in one process; start it without torchrun"):
        DecodeArguments().rows(Processes(0, 2, CPU), 1.0)


def test_a_skipped_row_is_a_line_below_the_table(tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode, "_steps", no_memory)
    arguments = ["--architectures", "transformer", "--contexts", "1024", "--batch-sizes", "1"]
    assert main(["bench", "decode", "--out", str(tmp_path), *arguments, *TINY]) == 0
    assert "skipped=out of memory" in capsys.readouterr().out
    table = (tmp_path / "decode.md").read_text()
    assert "\nSkipped: transformer, batch 1, context 1,024: out of memory.\n" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--preset", "1bb"], "size '1bb' has no preset; perhaps you meant '1b'"),
        (["train", "--architectures", "paragro"], "perhaps you meant 'paragru'"),
        (["train", "--batch-size", "0"], "batch-size is 0; it must be >= 1"),
        (["decode", "--contexts", "0"], "contexts is (0,); it must be >= 1"),
        (["decode", "--architectures"], "architectures is empty; name at least one"),
        (
            ["train", "--architectures", "paragru", "mamba2", "--memory-options", "key_size=8"],
            "memory_options is key_size=8, but no block of paragru, mamba2 has a memory; leave it",
        ),
        (["decode", *MEMORY, "key_size"], "memory_options is key_size; it must be NAME=VALUE"),
        (["train", *MEMORY, "heads=2"], "m2rnn cannot be built: memory 'm2rnn' does not take"),
        (["decode", *MEMORY, "nonlinearity=relu"], "nonlinearity is 'relu'; it must be 'tanh' or"),
        (["decode", *MEMORY, "key_size=abc"], "key_size must be a whole number, got 'abc'"),
        (
            ["decode", "--architectures", "3xparagru", "--layers", "2"],
            "3xparagru cannot be built: architecture '3xparagru' has 3 blocks but the model has 2",
        ),
    ],
)
def test_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err.replace("│", " ")
    assert message in " ".join(printed.split())


def test_misspelt_benchmark(capsys):
    assert main(["bench", "decoed"]) == 1
    assert "no benchmark 'decoed'; perhaps you meant 'decode'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kernels", "decode", "train"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, "--help"])
    assert stop.value.code == 0
    assert f"usage: pararnn bench {name}" in capsys.readouterr().out
