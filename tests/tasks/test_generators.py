"""Generators against solvers in plain Python; splits; what the inputs give away; the metric."""

import dataclasses

import pytest
import torch

from pararnn.tasks import TASKS, Batch, draw, score
from pararnn.tasks.catalogue import find_task
from pararnn.tasks.k_hop import KHop
from pararnn.tasks.needle import Needle
from pararnn.tasks.task import chance, quarter

from .solvers import SOLVERS

SPLITS = ("train", "validation", "test")


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


def answers_of(batch, row):
    places = batch.counts[row].nonzero().squeeze(1).tolist()
    return {t: int(batch.targets[row, t]) for t in places}


@pytest.mark.parametrize("extra", [0, 1, 2, 7, 40])
def test_equals_the_solver(name, extra):
    task = TASKS[name]
    length = max(task.min_length + extra, 4)
    batch = draw(task, 40, length, split="train", seed=extra, device="cpu")
    assert batch.tokens.shape == batch.targets.shape == batch.counts.shape == (40, length)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    for row, tokens in enumerate(batch.tokens.tolist()):
        assert answers_of(batch, row) == SOLVERS[name](task, tokens), tokens
        assert set(tokens) <= set(range(task.vocab_size))
    assert (batch.targets[~batch.counts] == 0).all()
    assert batch.targets.max() < task.num_classes


def test_long_sequences(name):
    task = TASKS[name]
    batch = draw(task, 2, 700, split="test", seed=3, device="cpu")
    for row, tokens in enumerate(batch.tokens.tolist()):
        assert answers_of(batch, row) == SOLVERS[name](task, tokens)


def test_other_settings():
    for task, solver in (
        (KHop(hops=3, values=4), "1-hop"),
        (Needle(needles=7, values=9), "needle"),
    ):
        batch = draw(task, 30, 60, split="train", seed=0, device="cpu")
        for row, tokens in enumerate(batch.tokens.tolist()):
            assert answers_of(batch, row) == SOLVERS[solver](task, tokens)


def test_all_is_drawn(name):
    """All tokens and all classes occur, and no class nearly always."""
    task = TASKS[name]
    batch = draw(task, 4000, 40, split="train", seed=0, device="cpu")
    assert batch.tokens.unique().tolist() == list(range(task.vocab_size))
    targets = batch.targets[batch.counts]
    classes = range(task.values // 2, task.values) if name == "mqar" else range(task.num_classes)
    assert targets.unique().tolist() == list(classes)
    assert chance(batch) < max(0.55, 1.2 / task.num_classes)


def test_same_seed_same_samples(name):
    task = TASKS[name]
    options = {"size": 20, "length": 30, "device": "cpu"}
    one = draw(task, **options, split="train", seed=5)
    again = draw(task, **options, split="train", seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for other in ({"split": "train", "seed": 6}, {"split": "test", "seed": 5}):
        assert not torch.equal(one.tokens, draw(task, **options, **other).tokens)


@pytest.mark.parametrize("length", [None, 24])
def test_splits_share_nothing(name, length):
    """Also where there are few sequences, so that each split has nearly all of its own."""
    task = TASKS[name]
    length = length or max(task.min_length, 10 if task.vocab_size < 8 else 4)
    found = {
        split: {
            tuple(row)
            for seed in (0, 1)
            for row in draw(task, 300, length, split=split, seed=seed, device="cpu").tokens.tolist()
        }
        for split in SPLITS
    }
    for one, other in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert found[one]
        assert not found[one] & found[other]


def test_quarters_are_even_and_depend_on_every_token():
    every = torch.cartesian_prod(*[torch.arange(2)] * 14)
    counts = quarter(every).bincount(minlength=4)
    assert counts.sum() == 1 << 14
    assert (counts - (1 << 12)).abs().max() < 300  # 5 standard deviations
    tokens = torch.randint(100, (500, 60))
    before = quarter(tokens)
    for t in range(60):
        changed = tokens.clone()
        changed[:, t] += 1
        same = (quarter(changed) == before).double().mean()
        assert 0.1 < same < 0.4, t


def test_splits_do_not_change_what_is_asked(name):
    """Each split has as many of each answer as the others."""
    task = TASKS[name]
    shares = []
    for split in SPLITS:
        batch = draw(task, 4000, 30, split=split, seed=0, device="cpu")
        targets = batch.targets[batch.counts]
        shares.append(targets.bincount(minlength=task.num_classes) / len(targets))
    for share in shares[1:]:
        assert (share - shares[0]).abs().max() < 0.04


GIVEN_AWAY = {
    # One hop leads to the token itself after a double one; two hops also where the last two pairs
    # are turned around: 1/5 + 4/5 (1/5 + 4/5 1/4) with 5 tokens.
    "1-hop": 0.1 + 0.9 / 10,
    "2-hop": 0.52,
    # A letter that is no permutation leads to few states.
    "automaton": 0.3,
}


def test_the_token_read_last_does_not_give_the_answer_away(name):
    """Far enough from the beginning, where all is easier."""
    task = TASKS[name]
    batch = draw(task, 20_000, 24, split="train", seed=1, device="cpu")
    counts = batch.counts.clone()
    counts[:, :12] = False
    pairs = batch.tokens[counts] * task.num_classes + batch.targets[counts]
    table = pairs.bincount(minlength=task.vocab_size * task.num_classes)
    table = table.view(task.vocab_size, task.num_classes)
    total = table.sum().item()
    least = max(table.sum(0).max().item() / total, GIVEN_AWAY.get(name, 0.0))
    spread = 3 * (task.vocab_size * least / total) ** 0.5  # largest of few counts
    assert table.amax(1).sum().item() / total < 1.1 * least + spread


ENDLESS = [n for n in TASKS if n not in ("keep-nth", "needle", "mqar", "selective-copying")]


@pytest.mark.parametrize("endless", ENDLESS)
def test_answers_hang_on_the_past_alone(endless):
    """The other tasks ask at their end; there the solver reads what comes before."""
    task = TASKS[endless]
    batch = draw(task, 30, 40, split="train", seed=2, device="cpu")
    for row, tokens in enumerate(batch.tokens.tolist()):
        expected = answers_of(batch, row)
        for end in (10, 25):
            found = SOLVERS[endless](task, tokens[:end])
            assert found == {t: a for t, a in expected.items() if t < end}


def test_score_of_a_perfect_and_of_a_random_predictor(name):
    task = TASKS[name]
    batch = draw(task, 3000, 40, split="test", seed=0, device="cpu")
    answers = torch.where(batch.counts, batch.targets, -1)  # what does not count may be anything
    perfect = score(answers, batch)
    assert perfect.accuracy == perfect.sequence_accuracy == 1.0
    assert perfect.counted == int(batch.counts.sum())
    assert perfect.sequences == 3000
    random = score(torch.randint(task.num_classes, batch.targets.shape), batch)
    expected = 1 / task.num_classes
    error = 5 * (expected * (1 - expected) / random.counted) ** 0.5
    assert abs(random.accuracy - expected) < error
    constant = score(torch.zeros_like(batch.targets), batch)
    assert constant.accuracy <= chance(batch)


def test_score_counts_what_it_says():
    batch = Batch(
        tokens=torch.zeros(3, 4, dtype=torch.int64),
        targets=torch.tensor([[1, 2, 3, 0], [1, 1, 0, 0], [0, 0, 0, 0]]),
        counts=torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4]),
    )
    found = score(torch.tensor([[1, 2, 0, 9], [1, 1, 9, 9], [9, 9, 9, 9]]), batch)
    assert found == (4, 5, 2, 3)
    assert found.plus(found) == (8, 10, 4, 6)
    assert chance(batch) == 3 / 5
    with pytest.raises(ValueError, match=r"answers have shape \(3,\), targets \(3, 4\)"):
        score(torch.zeros(3), batch)


def test_too_short(name):
    task = TASKS[name]
    with pytest.raises(ValueError, match="the shortest sequences of"):
        draw(task, 3, task.min_length - 1, split="test", seed=0, device="cpu")


def test_a_split_without_sequences():
    own = quarter(torch.tensor([[0], [1]])).tolist()
    empty = "validation" if 2 not in own else "test"
    with pytest.raises(ValueError, match="too few sequences of 1 token for the"):
        draw(TASKS["parity"], 3, 1, split=empty, seed=0, device="cpu")


def test_unknown_task():
    with pytest.raises(ValueError, match="no task 'pairty'; perhaps you meant 'parity'"):
        find_task("pairty")


def test_the_paper_is_quoted():
    known = {
        name: [(k.architecture, k.accuracy) for k in task.known]
        for name, task in TASKS.items()
        if task.known
    }
    assert list(known) == ["keep-nth", "parity", "mqar", "1-hop", "2-hop"]
    assert [dict(k)["transformer"] for k in known.values()] == [100, 53, 100, 82, 78]
    assert [dict(k)["mamba2"] for k in known.values()] == [1, 52, 100, 100, 98]
    assert dataclasses.replace(TASKS["keep-nth"], nth=4).known == ()
