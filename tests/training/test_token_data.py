"""Runs on prepared token data: train, resume, evaluate, generate, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pararnn.cli.main import main
from pararnn.lm.data import PrepareConfig, open_tokens, prepare
from pararnn.lm.models import CausalLoss
from pararnn.lm.training import RunFolder, TrainConfig
from pararnn.lm.training.text import open_codec

TINY = """--device cpu
--architecture.width 16 --architecture.num-layers 1 --architecture.num-heads 2
--text.sequence-length 16 --text.batch-size 2 --text.validation-tokens 100 --steps 4
--checkpoint-every 2""".split()


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """Data of a tokenizer with 300 entries, made in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for n in range(20):
        words = " ".join(f"word{(n * k) % 7} goes on" for k in range(40))
        (tmp_path / f"text/{n}.txt").write_text(f"Text {n}. {words}.")
    config = PrepareConfig(sources=("text",), tokenizer="train:300", held_out=0.2)
    prepare(config, tmp_path / "tokens", workers=1)
    return open_tokens(tmp_path / "tokens")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_resume_evaluate_and_generate(tokens, capsys):
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 0
    printed = capsys.readouterr().out
    assert f"{tokens.train.num_tokens:,} tokens to train on" in printed
    assert "held-out tokens" in printed
    run = RunFolder(tokens.folder.parent / "run")
    step = records(run.metrics)[0]
    per_byte = tokens.train.num_tokens / tokens.train.num_bytes
    assert step["bits_per_byte"] == pytest.approx(step["loss"] / math.log(2) * per_byte)
    model = json.loads((run.checkpoints / "step-00000004/config.json").read_text())
    assert model["vocab_size"] == 512  # 300 rounded up to a multiple of 256
    assert model["eos_token_id"] == tokens.separator
    beside = AutoTokenizer.from_pretrained(run.checkpoints / "step-00000004")
    assert beside.decode(beside("word5 goes")["input_ids"]) == "word5 goes"
    assert main(["train", "--resume", "--out", "run", "--steps", "6"]) == 0
    assert [r["step"] for r in records(run.metrics)] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert main(["eval", "run", "--device", "cpu"]) == 0
    assert f"per token) on {tokens.validation.num_tokens - 1} held-out tokens" in (
        capsys.readouterr().out
    )
    assert main(["eval", "run", "--data", "text/3.txt", "--device", "cpu"]) == 0
    assert "tokens of text/3.txt" in capsys.readouterr().out
    shutil.rmtree(tokens.folder)  # a run keeps its tokenizer
    assert main(["generate", "run", "--prompt", "Text 3", "--num-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Text 3")
    assert open_codec(run).decode(open_codec(run).encode("word5 goes")[0]) == "word5 goes"
    assert main(["train", "--resume", "--out", "run", "--steps", "8"]) == 1
    assert "there is no file or folder" in capsys.readouterr().err


def test_documents_begin_at_the_separator_of_any_tokenizer(tokens, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    tokenizer.save_pretrained("tokenizer")
    config = PrepareConfig(sources=("text",), tokenizer="tokenizer", held_out=0.2)
    prepare(config, tokens.folder.parent / "others", workers=1)
    separator = open_tokens(tokens.folder.parent / "others").separator
    assert separator == tokenizer.eos_token_id != 0
    seen = []
    forward = CausalLoss.forward

    def spy(self, tokens, targets, resets=None, cache=None):
        if tokens.max() > 1:  # not the trial before the start
            seen.append((tokens, resets))
        return forward(self, tokens, targets, resets, cache)

    monkeypatch.setattr(CausalLoss, "forward", spy)
    assert main(["train", "--data", "others", "--out", "run", *TINY]) == 0
    apart = [(tokens, resets) for tokens, resets in seen if resets is not None]
    assert apart
    assert all(torch.equal(resets, tokens == separator) for tokens, resets in apart)


def test_damaged_data_stops_the_run_before_it_begins(tokens, capsys):
    shard = tokens.folder / tokens.train.shards[0].file
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 1
    assert "does not have the checksum" in capsys.readouterr().err
    assert not (tokens.folder.parent / "run").exists()


def test_of_a_tokenizer_only_its_own_files_are_copied(tokens):
    """What else is beside them in data of others could be read as a part of a checkpoint."""
    foreign = (".metadata", "model.safetensors", "config.json", "progress.json", "modeling.py")
    for name in foreign:
        (tokens.tokenizer / name).write_text("{}")
    (tokens.tokenizer / "state").mkdir()
    (tokens.tokenizer / "state/.metadata").write_text("code")
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 0
    run = RunFolder(tokens.folder.parent / "run")
    own = set(tokens.tokenizer_files)
    assert {path.name for path in (run.data / "tokenizer").iterdir()} == own
    checkpoint = run.checkpoints / "step-00000004"
    assert own < {path.name for path in checkpoint.iterdir()}
    assert not (checkpoint / "modeling.py").exists()
    assert (checkpoint / "state/.metadata").read_bytes() != b"code"
    for name in ("config.json", "model.safetensors"):
        assert (checkpoint / name).read_bytes() != b"{}"


def test_a_changed_tokenizer_of_a_run_is_refused(tokens, capsys):
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 0
    path = tokens.folder.parent / "run/data/tokenizer/tokenizer_config.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "a"))
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "run", "--steps", "6"]) == 1
    assert "tokenizer_config.json does not have its checksum" in capsys.readouterr().err


def test_data_that_is_not_finished_stops_the_run_before_it_begins(tokens, capsys):
    index = tokens.folder / "index.json"
    index.rename(tokens.folder / "progress.json")
    capsys.readouterr()
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 1
    assert "is not finished (no index.json); call the same pararnn data" in capsys.readouterr().err
    (tokens.folder / "progress.json").unlink()
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 1
    assert "index.json is missing; restore it" in capsys.readouterr().err
    assert not (tokens.folder.parent / "run").exists()


def test_prepared_data_is_no_text_to_evaluate(tokens, capsys):
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--device", "cpu", "--data", "tokens"]) == 1
    assert "tokens holds prepared tokens, not texts" in capsys.readouterr().err


def test_paths_may_be_text(tokens):
    config = TrainConfig(data="tokens", out="run")
    assert (config.data, config.out) == (Path("tokens"), Path("run"))
    assert RunFolder("run").data == Path("run/data")


def test_a_stack_of_a_size(capsys):
    stack = ["--model", "m2rnn+delta", "--memory-options", "key_size=128"]
    assert main(["train", "--size", "400m", *stack, "--print-config"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["model"], config["memory_options"]) == ("m2rnn+delta", ["key_size=128"])
    assert (config["architecture"]["width"], config["optimizer"]["learning_rate"]) == (1024, 5e-3)


def test_size_is_a_starting_point(tokens, capsys):
    arguments = ["train", "--size", "1b", "--model", "paralstm", "--data", "tokens"]
    assert main([*arguments, "--text.batch-size", "4", "--print-config"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["architecture"]["width"] == 2048
    assert config["optimizer"]["learning_rate"] == 3e-3
    assert config["text"]["global_batch_size"] == 256
    assert config["text"]["batch_size"] == 4
    assert config["steps"] == config["schedule"]["length"] == 55_000
    for wrong, message in (
        (["--size", "3b"], "size '3b' has no preset"),
        (["--size", "1b", "--model", "mg"], "no architecture 'mg'; perhaps you meant 'mgu'"),
        (["--size", "1b", "--resume"], "--resume does not work with --size"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *wrong])
        assert message in capsys.readouterr().err


def test_a_tokenizer_that_is_missing_or_added_is_named(tokens, capsys):
    """The bytes would be taken for tokens, or the other way round."""
    assert main(["train", "--data", "tokens", "--out", "run", *TINY]) == 0
    folder = tokens.folder.parent / "run/data/tokenizer"
    kept = folder.rename(folder.with_name("kept"))
    capsys.readouterr()
    for command in (["generate", "run"], ["eval", "run", "--data", "text/3.txt"]):
        assert main([*command, "--device", "cpu"]) == 1
        message = "tokenizer/tokenizer.json is not what the model was trained with; restore it from"
        assert message in capsys.readouterr().err
    assert main(["train", "--data", "text", "--out", "bytes", *TINY]) == 0
    shutil.copytree(kept, tokens.folder.parent / "bytes/data/tokenizer")
    capsys.readouterr()
    assert main(["generate", "bytes", "--device", "cpu"]) == 1
    assert "is not what the model was trained with; move it away" in capsys.readouterr().err
