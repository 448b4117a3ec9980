"""transformers' `Trainer` trains and measures these models as it does its own."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from pararnn.lm.models import ParaRNNForCausalLM

from .conftest import tiny_config

TEXTS = [
    torch.randint(1, 17, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 3, 2, 7)
]


def padded(rows):
    ids = pad_sequence([r["input_ids"] for r in rows], batch_first=True)
    labels = ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a tiny model by plain gradient descent, whose step is its whole update."""

    def make(batch_size=4, accumulated=1, collator=padded, z_loss_weight=0.2, **options):
        torch.manual_seed(1)
        model = ParaRNNForCausalLM(tiny_config(z_loss_weight=z_loss_weight)).double()
        settings = {n: options.pop(n) for n in ("label_smoothing_factor",) if n in options}
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=2,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
            **settings,
        )
        data = [{"input_ids": t} for t in TEXTS]
        return Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            data_collator=collator,
            **options,
        )

    return make


def update(trainer):
    """What one step adds to the parameters."""
    before = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainer's own libraries
        trainer.train()
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach() - before


def own_loss(outputs, labels, num_items_in_batch):
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing_factor": 0.1}, {"compute_loss_func": own_loss}]
)
def test_accumulated_batches_count_tokens(trainer, options):
    whole, parts = (update(trainer(*sizes, **options)) for sizes in ((4, 1), (1, 4)))
    assert whole.norm() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-8)


def test_the_step_is_that_of_the_mean_over_tokens(trainer):
    made = trainer(1, 4)
    model = ParaRNNForCausalLM(made.model.config).double()
    model.load_state_dict(made.model.state_dict())
    nats, squares, count = 0.0, 0.0, sum(len(t) - 1 for t in TEXTS)
    for text in TEXTS:
        output = model(text[None], labels=text[None])
        nats += output.cross_entropy * (len(text) - 1)
        squares += output.z_loss * (len(text) - 1)
    ((nats + 0.2 * squares) / count).backward()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # weights at their bound stay there
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(update(made), after - before, rtol=1e-5, atol=1e-8)


def test_smoothed_labels_are_shifted(trainer):
    """As for models of transformers' own, which the trainer knows by their names."""
    made = trainer(label_smoothing_factor=0.1, z_loss_weight=0.0)
    batch = padded([{"input_ids": t} for t in TEXTS])
    output = made.model(**{n: v for n, v in batch.items() if n != "labels"})
    targets = batch["labels"][:, 1:].flatten()
    logits = output.logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(made.compute_loss(made.model, batch), expected)


def test_flattened_documents_give_the_update_of_padded_ones(trainer):
    flat = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    torch.testing.assert_close(
        update(trainer(2, 2, collator=flat)), update(trainer(2, 2)), rtol=1e-6, atol=1e-8
    )


def test_evaluation_has_a_loss_and_logits(trainer):
    seen = []
    made = trainer(z_loss_weight=0.0, compute_metrics=lambda p: seen.append(p) or {"found": 1.0})
    assert made.label_names == ["labels"]
    measured = made.evaluate()
    assert measured["eval_found"] == 1.0
    assert measured["eval_loss"] > 0
    assert seen[0].predictions.shape[::2] == (4, 17)
    batch = padded([{"input_ids": t} for t in TEXTS[:2]])
    loss, logits, labels = made.prediction_step(made.model, batch, prediction_loss_only=False)
    count = [len(t) - 1 for t in TEXTS[:2]]
    alone = [
        n * made.model(t[None], labels=t[None]).loss for n, t in zip(count, TEXTS, strict=False)
    ]
    torch.testing.assert_close(loss, (sum(alone) / sum(count)).detach())
    assert logits.shape == (2, 9, 17)
    assert torch.equal(labels, batch["labels"])
    only = made.prediction_step(made.model, batch, prediction_loss_only=True)
    assert only[1:] == (None, None)
    assert only[0] == loss
