"""The harness on a local task, without network; its figures against the model's own logits."""

import sys

import pytest
import torch
from forks import Fork, python

from pararnn.cli.main import main
from pararnn.lm.data.errors import RunError
from pararnn.lm.evaluation import ByteTokenizer, HarnessModel, run_tasks
from pararnn.lm.models.architectures import Shape, make_config, make_model
from pararnn.lm.training.checkpoints import quiet_transformers

from .conftest import QUESTIONS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def log_likelihood(model, context, continuation):
    """The sum over a continuation's bytes, of a document that begins with the context."""
    tokens = torch.tensor([[0, *context.encode(), *continuation.encode()]])
    nats = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
    each = nats.gather(1, tokens[0, 1:, None]).squeeze(1)
    return each[len(context.encode()) :].sum().item()


def test_log_likelihoods_are_those_of_the_model(model, task_folder):
    harness = HarnessModel(model, batch_size=3)
    results = run_tasks(harness, ["tiny_choice"], task_folder=task_folder)
    samples = results["samples"]["tiny_choice"]
    assert len(samples) == len(QUESTIONS)
    correct = []
    for sample in samples:
        document = sample["doc"]
        expected = [
            log_likelihood(model, document["question"] + "\nAnswer:", " " + choice)
            for choice in document["choices"]
        ]
        found = [response[0] for response in sample["filtered_resps"]]
        assert found == pytest.approx(expected, rel=1e-4)
        correct.append(expected.index(max(expected)) == document["answer"])
    accuracy = results["results"]["tiny_choice"]["acc,none"]
    assert accuracy == pytest.approx(sum(correct) / len(correct))


def test_a_baseline(task_folder):
    config = make_config("transformer", Shape(vocab_size=256, width=16, num_layers=1, num_heads=2))
    model = make_model(config).eval()
    results = run_tasks(HarnessModel(model), ["tiny_choice"], task_folder=task_folder, limit=1)
    (sample,) = results["samples"]["tiny_choice"]
    expected = log_likelihood(model, "What is round?\nAnswer:", " a ball")
    assert sample["filtered_resps"][0][0] == pytest.approx(expected, rel=1e-4)


def test_fewshot_and_limit(model, task_folder):
    harness = HarnessModel(model, batch_size=2)
    results = run_tasks(harness, ["tiny_choice"], task_folder=task_folder, num_fewshot=2, limit=1)
    (sample,) = results["samples"]["tiny_choice"]
    assert sample["arguments"][0][0].count("Answer:") == 3


def test_generated_text(model):
    from lm_eval.api.instance import Instance

    arguments = ("to be", {"until": ["\n\n"], "max_gen_toks": 6})
    instance = Instance("generate_until", {}, arguments, 0)
    longer = Instance("generate_until", {}, ("to be or not", arguments[1]), 1)
    harness = HarnessModel(model, batch_size=2)
    texts = harness.generate_until([instance, longer], disable_tqdm=True)
    alone = harness.generate_until([instance], disable_tqdm=True)
    assert texts[0] == alone[0]
    assert len(texts) == 2


def test_rolling_log_likelihood_covers_the_text(model):
    from lm_eval.api.instance import Instance

    text = "the state after the last step"
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = HarnessModel(model).loglikelihood_rolling([request], disable_tqdm=True)
    assert found == pytest.approx(log_likelihood(model, "", text), rel=1e-4)


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("Bär") == [0, 66, 195, 164, 114]
    assert tokenizer.encode("a b", add_special_tokens=False) == [97, 32, 98]
    assert tokenizer.decode([0, 66, 195, 164, 114], skip_special_tokens=True) == "Bär"
    assert tokenizer.decode([195]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.encode(" two  spaces \n", add_special_tokens=False) == list(b" two  spaces \n")
    padded = tokenizer(["ab", "a"], padding=True, padding_side="left")
    assert padded["input_ids"] == [[0, 97, 98], [0, 0, 97]]
    assert padded["attention_mask"] == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("device", [None, "cpu", "auto", torch.device("cpu")])
def test_devices(model_folder, device):
    assert HarnessModel(model_folder, device=device, dtype="float64").model.dtype is torch.float64
    with pytest.raises(RunError, match="device 'gpu' is not one of PyTorch's"):
        HarnessModel(model_folder, device="gpu")


def test_a_cpu_with_a_number_is_the_cpu(model_folder, monkeypatch):
    """lm-eval itself knows no such name, and would take the GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert HarnessModel(model_folder, device="cpu:0").device == torch.device("cpu")


def test_a_model_in_memory_keeps_its_type(model):
    assert HarnessModel(model.double(), device="cpu").model.dtype is torch.float64
    with pytest.raises(TypeError, match=r"a model in memory has a type; pass model.to\(dtype\)"):
        HarnessModel(model, dtype="float64")


@pytest.fixture
def model_folder(model, tmp_path):
    with quiet_transformers():
        model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command_on_a_folder(model_folder, task_folder, capsys):
    arguments = ["--tasks", "tiny_choice", "--task-folder", str(task_folder), "--device", "cpu"]
    assert main(["eval", str(model_folder), *arguments, "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "|tiny_choice|" in printed
    assert "acc" in printed


def test_harness_command(model_folder, task_folder, tmp_path):
    """`lm_eval` itself, in a process that has imported neither it nor our model of it."""
    command = f"""--model pararnn --model_args pretrained={model_folder} --device cpu
        --tasks tiny_choice --include_path {task_folder}"""
    with Fork(python, "-m", "pararnn.lm.evaluation", *command.split(), folder=tmp_path) as done:
        printed, error = done.communicate()
    assert done.returncode == 0, error
    assert "|tiny_choice|" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_choise", "--task-folder", "tasks"], "perhaps you meant 'tiny_choice'"),
        (["--tasks", "tiny_choice", "--task-folder", "none"], "none is no folder; name one that"),
        (["--tasks", "no_data", "--task-folder", "tasks"], "the data of no_data cannot be had"),
    ],
)
def test_messages_of_the_command(
    model_folder, task_folder, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "model", "--device", "cpu", *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[-1]


def test_a_folder_without_model(tmp_path):
    with pytest.raises(RunError, match=r"neither a run \(no checkpoints/\) nor a model"):
        HarnessModel(tmp_path)


def test_a_vocabulary_without_tokenizer(tmp_path):
    from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM

    config = ParaRNNConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_heads=1)
    with pytest.raises(RunError, match="300 tokens and comes with no tokenizer; pass tokenizer="):
        HarnessModel(ParaRNNForCausalLM(config))


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.split(".")[0] == "lm_eval" or name.startswith("pararnn.lm.evaluation"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "model", "--tasks", "piqa"]) == 1
    printed = capsys.readouterr().err
    assert "tasks need the package lm_eval" in printed
    assert 'pip install "pararnn[eval]"' in printed
