import functools
import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

QUESTIONS = [
    {"question": "What is round?", "choices": ["a ball", "a brick wall"], "answer": 0},
    {"question": "Was ist größer?", "choices": ["eine Maus", "ein Bär"], "answer": 1},
    {"question": "Which one is a colour?", "choices": ["two", "red", "loud"], "answer": 1},
    {"question": "Which one flies?", "choices": ["bird", "stone"], "answer": 0},
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


@pytest.fixture(autouse=True)
def _without_the_tasks_of_the_harness(monkeypatch):
    """Reading their thousands of files takes seconds."""
    from pararnn.lm.evaluation import tasks

    manager = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)


@pytest.fixture
def task_folder(tmp_path):
    """A folder with the task `tiny_choice`, its data beside it, and `no_data` without any."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "questions.json"
    file.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    for name, data in (("tiny_choice", file), ("no_data", folder / "none.json")):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=data))
    return folder


@pytest.fixture
def model():
    """A tiny byte-level model in evaluation mode."""
    from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM

    torch.manual_seed(3)
    config = ParaRNNConfig(
        vocab_size=256,
        hidden_size=16,
        num_hidden_layers=1,
        num_heads=2,
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    return ParaRNNForCausalLM(config).eval()
