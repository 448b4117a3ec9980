"""Kernels that calls of one form find again."""

import pytest
import torch

from pararnn.kernels.triton import build
from pararnn.kernels.triton.build import Launches, form_of


class Kernel:
    """Remembers what it is launched with, as a kernel of Triton and as what that compiles."""

    arg_names = ("x", "SIZE")
    run = "loaded"

    def __init__(self, spills=0):
        self.n_spills, self.slow, self.fast = spills, [], []

    def warmup(self, *, grid, x, SIZE, num_warps, maxnreg):
        assert (SIZE, num_warps, maxnreg) == (8, 2, 168)
        return self

    def __getitem__(self, grid):
        def launch(*values, **named):
            (self.slow if named else self.fast).append((grid, values, named))
            return self

        return launch


def call(launches, form, *kernels):
    launcher = launches.of(form)
    for n, kernel in enumerate(kernels):
        given = {"x": n, "SIZE": 8, "y": 5, "num_warps": 2, "maxnreg": 168, "most_spilled": 8}
        launcher.launch(kernel, (n + 1,), given)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setattr(build, "interpreted", lambda: False)


def test_a_second_call_of_a_form_finds_what_was_compiled():
    launches, one, two = Launches(), Kernel(), Kernel()
    call(launches, "a", one, two)
    named = {"x": 1, "SIZE": 8, "num_warps": 2, "maxnreg": 168}
    assert two.slow == [((2,), (), named)]
    assert not two.fast
    call(launches, "a", one, two)
    assert two.fast == [((2, 1, 1), (1, 8), {})]
    call(launches, "b", one, two)
    assert [len(k.slow) for k in (one, two)] == [2, 2]


def test_a_call_that_failed_is_gone_on_with():
    launches, one, two = Launches(), Kernel(), Kernel()
    call(launches, "a", one)
    call(launches, "a", one, two)
    assert (len(one.slow), len(one.fast), len(two.slow)) == (1, 1, 1)


def test_a_call_knows_whether_its_form_launched_the_next_kernel():
    launches, kernel = Launches(), Kernel()
    assert not launches.of("a").knows_next
    call(launches, "a", kernel)
    again = launches.of("a")
    assert again.knows_next
    again.launch(kernel, (1,), {"x": 0, "SIZE": 8})
    assert not again.knows_next
    again.launch(kernel, (1,), {"x": 0, "SIZE": 8, "launch_pdl": True})  # without `most_spilled`
    assert kernel.slow[-1] == ((1,), (), {"x": 0, "SIZE": 8, "launch_pdl": True})


def test_what_spills_much_has_all_registers():
    launches, few, many = Launches(), Kernel(8), Kernel(9)
    for _ in range(2):
        call(launches, "a", few, many)
    assert [k.slow[0][2].get("maxnreg") for k in (few, many)] == [168, None]
    assert [(len(k.slow), len(k.fast)) for k in (few, many)] == [(1, 1), (1, 1)]


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setattr(build, "interpreted", lambda: True)
    launches, kernel = Launches(), Kernel(9)
    for _ in range(2):
        call(launches, "a", kernel)
    assert (len(kernel.slow), len(kernel.fast)) == (2, 0)
    assert kernel.slow[0][2]["maxnreg"] == 168


def test_forms_are_forgotten_when_there_are_many():
    launches, kernel = Launches(), Kernel()
    for form in range(300):
        call(launches, form, kernel)
    assert len(launches._known) < 300
    call(launches, 299, kernel)
    assert len(kernel.fast) == 1


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 8, dtype=torch.bfloat16),
        torch.zeros(2, 9),
        torch.zeros(8, 2).t(),
        torch.zeros(17)[1:].view(2, 8),
        None,
    ],
    ids=["type", "shape", "strides", "place", "none"],
)
def test_what_tells_forms_apart(other):
    form = form_of([torch.zeros(2, 8), None])
    assert form == form_of([torch.ones(2, 8), None])
    assert hash(form)
    assert form != form_of([other, None])
