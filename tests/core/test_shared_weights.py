"""Products of the state with weights, however they are written: the loop's values and gradients.

No weight may be copied for the rows, which are all times of all sequences.
"""

import functools
import itertools

import pytest
import torch
from torch import nn

from pararnn import RNN, Newton
from pararnn.testing import loop

from .compare import assert_same, outcome, random_state

HEADS, ROWS, SIZE = 2, 3, 4


class Multiplied(nn.Module):
    """`product(state, weight)` with the state as a matrix per head, or a vector, added to x."""

    num_components = 1

    def __init__(self, product, state, weight):
        super().__init__()
        self.product, self.state = product, state
        self.input_size = self.hidden_size = torch.Size(state).numel()
        self.weight = nn.Parameter(torch.randn(weight, dtype=torch.float64) * 0.4)

    def forward(self, x, h):
        product = self.product(h.view(len(h), *self.state), self.weight)
        return torch.tanh(x + product.reshape(h.shape))


def assert_equals_the_loop(cell):
    x = torch.randn(3, 7, cell.input_size, dtype=torch.float64)
    state = random_state(1, 3, cell.hidden_size)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    for solver in (None, Newton(chunk=3)):
        assert_same(outcome(RNN(cell, solver=solver), cell, x, state), expected, 1e-8)


def assert_not_copied(cell):
    """Neither as an input, nor by an operation of a step or of its adjoint."""
    step = RNN(cell).runner().traced.step
    assert sum(step.by_rows) == 1, "x alone has rows"
    sizes = []

    class Sizes(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                sizes.append(value.untyped_storage().nbytes() // value.element_size())
            return value

    rows = 64
    given = [torch.rand(rows, cell.hidden_size, dtype=torch.float64)]
    Sizes(step.module).run(*given, *(i.example(rows, step.device) for i in step.inputs))
    assert max(sizes) <= rows * cell.hidden_size


VECTOR, MATRIX, FLAT = (HEADS, SIZE), (HEADS, ROWS, SIZE), (ROWS, SIZE)
PER_HEAD, SQUARE = (HEADS, SIZE, SIZE), (SIZE, SIZE)
LEFT = (HEADS, ROWS, ROWS)
FORMS = {
    "matmul": (lambda s, w: s @ w, MATRIX, PER_HEAD),
    "matmul_turned": (lambda s, w: s @ w.mT, MATRIX, PER_HEAD),
    "matmul_of_one": (lambda s, w: s @ w, MATRIX, (1, SIZE, SIZE)),
    "matmul_of_one_per_head": (lambda s, w: s @ w, MATRIX, (1, HEADS, SIZE, SIZE)),
    "matmul_flat_of_one": (lambda s, w: s @ w, FLAT, (1, SIZE, SIZE)),
    "matmul_from_the_left": (lambda s, w: w @ s, MATRIX, LEFT),
    "matmul_from_the_left_of_one": (lambda s, w: w @ s, MATRIX, (1, ROWS, ROWS)),
    "matmul_of_vectors": (lambda s, w: w @ s[..., None], VECTOR, PER_HEAD),
    "matmul_of_vectors_and_one": (lambda s, w: w @ s[..., None], VECTOR, SQUARE),
    "matmul_expanded": (lambda s, w: s @ w.expand(len(s), *w.shape), MATRIX, PER_HEAD),
    "matmul_scaled": (lambda s, w: s @ (w.expand(len(s), *w.shape) * 0.7), MATRIX, PER_HEAD),
    "method": (lambda s, w: s.matmul(w.unsqueeze(0)), MATRIX, PER_HEAD),
    "bmm": (lambda s, w: torch.bmm(s, w.expand(len(s), -1, -1)), FLAT, SQUARE),
    "bmm_of_one": (lambda s, w: torch.bmm(s, w.expand(len(s), -1, -1)), FLAT, (1, *SQUARE)),
    "bmm_repeated": (lambda s, w: torch.bmm(s, w.repeat(len(s), 1, 1)), FLAT, SQUARE),
    "bmm_turned": (lambda s, w: torch.bmm(s, w.expand(len(s), -1, -1).mT), FLAT, SQUARE),
    "bmm_from_the_left": (lambda s, w: torch.bmm(w.expand(len(s), 3, 3), s), FLAT, (3, 3)),
    "bmm_of_all_heads": (
        lambda s, w: torch.bmm(s.flatten(0, 1), w.repeat(len(s), 1, 1)),
        MATRIX,
        PER_HEAD,
    ),
    "bmm_heads_first": (
        lambda s, w: torch.bmm(
            s.transpose(0, 1).flatten(0, 1), w.repeat_interleave(len(s), 0)
        ).view(HEADS, len(s), ROWS, SIZE).transpose(0, 1),
        MATRIX,
        PER_HEAD,
    ),
    "baddbmm": (
        lambda s, w: torch.baddbmm(s, s, w.expand(len(s), -1, -1), beta=0.5, alpha=0.3),
        FLAT,
        SQUARE,
    ),
    "tensordot": (lambda s, w: torch.tensordot(s, w, 1), MATRIX, SQUARE),
    "inner": (lambda s, w: torch.inner(s, w), MATRIX, SQUARE),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_products(name):
    torch.manual_seed(3)
    cell = Multiplied(*FORMS[name])
    if name != "bmm_heads_first":  # repeat_interleave is an index
        assert_not_copied(cell)
    assert_equals_the_loop(cell)


def equations():
    """All orders of letters of a state times a weight, per head or for all of them."""
    for state, result, kinds in (
        ("hi", "hj", ("hij", "ij")),
        ("hmi", "hmj", ("hij", "ij", "mij")),
        ("him", "hjm", ("hij", "ij")),
    ):
        for kind in kinds:
            for weight in map("".join, itertools.permutations(kind)):
                yield f"n{state},{weight}->n{result}"
                yield f"{weight},n{state}->n{result}"
    yield from ("...hi,hij->...hj", "nhi,hijk->nhjk", "nhi,higj->ngj", "nhi,hij,nhj->nhj")


@pytest.mark.parametrize("equation", list(equations()))
def test_einsum(equation):
    torch.manual_seed(5)
    terms = equation.split("->")[0].split(",")
    at = 0 if terms[0][0] in "n." else 1  # where the state is
    sizes = {"h": HEADS, "m": ROWS, "i": SIZE, "j": SIZE, "g": HEADS, "k": 1}
    shape = lambda term: tuple(sizes[letter] for letter in term if letter in sizes)  # noqa: E731

    def product(s, w):
        given = [w, s] if at else [s, w, s]
        return torch.einsum(equation, *given[: len(terms)])

    cell = Multiplied(product, shape(terms[at]), shape(terms[1 - at]))
    assert_not_copied(cell)
    assert_equals_the_loop(cell)


def test_weights_that_differ_by_row_stay():
    """A product with numbers of the row, and one with a weight that x scales."""

    def product(s, w):
        count = torch.arange(len(s)).view(-1, 1, 1) * 0
        return torch.bmm(s, w.expand(len(s), -1, -1) * (1 + s[:, :1, :1]) + count)

    torch.manual_seed(7)
    assert_equals_the_loop(Multiplied(product, FLAT, SQUARE))
