"""`check_cell`: does a cell evaluate in parallel to what the loop gives, in value and gradient?"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pararnn._notebook import table
from pararnn._whole import check_whole
from pararnn.layers.arguments import check_cell as refuse_what_is_no_cell
from pararnn.layers.rnn import RNN
from pararnn.planning.settings import Newton
from pararnn.testing.close import assert_close
from pararnn.testing.loop import loop
from pararnn.tracing.packed import Shape
from pararnn.tracing.partition import is_random
from pararnn.tracing.recorder import show_place
from pararnn.tracing.traced import Traced


@dataclass(frozen=True)
class CellCheck:
    """What `check_cell` found; a notebook shows it as a table.

    Attributes:
        structure: Of the recurrent part.
        errors: Largest relative error by "backend, chunk" over values and all gradients.
    """

    structure: str
    errors: dict[str, float]

    def _repr_html_(self) -> str:
        rows = [(run, f"{error:.0e}") for run, error in self.errors.items()]
        return table(rows, header=(self.structure, "largest error, values and gradients"))


def check_cell(
    cell: nn.Module,
    *,
    features: int | tuple[int, ...] | None = None,
    hidden_size: int | tuple[int, ...] | None = None,
    num_components: int | None = None,
    state_shape: Shape | tuple[Shape, ...] | None = None,
    batch: int = 3,
    time: int = 37,
    rtol: float = 1e-12,
    seed: int = 0,
) -> CellCheck:
    """Compare a cell on every backend with the step-by-step loop, in float64.

    Outputs, the final state and the gradients of x, the first state, the reset state and every
    parameter are compared, for random inputs, states, resets and cotangents. The cell itself is
    left alone. A cell that ignores its state is told so by a warning.

    Args:
        cell: The cell.
        features: Shape of one input; `cell.input_size` when None.
        hidden_size: As for `RNN`.
        num_components: As for `RNN`.
        state_shape: As for `RNN`.
        batch: Rows.
        time: Steps.
        rtol: Allowed error relative to the largest entry of each tensor.
        seed: Of the random numbers.

    Raises:
        AssertionError: Something differs; the message says what and by how much.
        TraceError: The cell cannot be evaluated for all times.
        TypeError: It is no cell, such as a class or an `RNN`; its input size is not known; or a
            number is no whole number.
        ValueError: The cell draws random numbers, so that no two evaluations are alike.
    """
    if isinstance(cell, RNN):
        raise TypeError("cell is an RNN already; pass the cell alone: check_cell(rnn.cell).")
    refuse_what_is_no_cell(cell)
    check_whole(batch=batch, time=time, seed=seed)
    cell = copy.deepcopy(cell).double()
    shape = features if features is not None else getattr(cell, "input_size", None)
    if shape is None:
        name = type(cell).__name__
        raise TypeError(
            f"{name} does not say the size of its input; pass check_cell(features=...)."
        )
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    check_whole(**{f"features[{i}]": size for i, size in enumerate(shape)})
    options: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_components": num_components,
        "state_shape": state_shape,
    }
    probe = RNN(cell, backend="torch", **options)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(batch, time, *shape)
    probe(x)
    traced = probe.runner().traced
    _refuse_random(traced)
    count = len(probe.state_shapes)
    states = [draw(batch, *s) for s in probe.state_shapes * 2]  # first, then after resets
    resets = torch.rand(batch, time, generator=generator) < 0.1
    outputs = draw(batch, time, *probe.output_shape)
    cotangents = [outputs, *(draw(*s.shape) for s in states[:count])]
    as_tuple = count > 1
    run = functools.partial(loop, cell)
    expected = _everything(cell, run, x, states, resets, cotangents, as_tuple)
    errors: dict[str, float] = {}
    with warnings.catch_warnings():  # which the probe has given already
        warnings.filterwarnings("ignore", message=".* ignores its state: ")
        chosen = RNN(cell, **options)
        chosen(x)
        for backend in dict.fromkeys(["torch", chosen.runner().choice.name]):
            for chunk in (1, 7, time):
                rnn = RNN(cell, backend=backend, solver=Newton(chunk=chunk), **options)
                actual = _everything(cell, rnn, x, states, resets, cotangents, as_tuple)
                label = f"{backend}, chunk={chunk}"
                errors[label] = max(
                    _compare(f"{name} ({label})", actual[name], expected[name], rtol)
                    for name in expected
                )
    return CellCheck(traced.structure, errors)


def _refuse_random(traced: Traced) -> None:
    for node in traced.capture.graph.nodes:
        if is_random(node):
            raise ValueError(
                f"{traced.subject.name} draws random numbers ({node.target} at "
                f"{show_place(node.meta.get('place'))}), so no two evaluations are alike; check it "
                "without them: cell.eval() turns off dropout."
            )


def _everything(
    cell: nn.Module,
    run: Any,
    x: Tensor,
    states: list[Tensor],
    resets: Tensor,
    cotangents: list[Tensor],
    as_tuple: bool,
) -> dict[str, Tensor]:
    """Values and gradients by name."""
    x = x.clone().requires_grad_()
    states = [s.clone().requires_grad_() for s in states]
    first, again = states[: len(states) // 2], states[len(states) // 2 :]
    pack = lambda parts: tuple(parts) if as_tuple else parts[0]  # noqa: E731
    y, last = run(x, pack(first), resets, reset_state=pack(again))
    lasts = last if as_tuple else (last,)
    total = sum((v * c).sum() for v, c in zip((y, *lasts), cotangents, strict=True))
    parameters = {n: p for n, p in cell.named_parameters() if p.requires_grad}
    inputs = {"x": x} | {f"state[{i}]": f for i, f in enumerate(first)} | parameters
    inputs |= {f"reset_state[{i}]": a for i, a in enumerate(again)}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    values = {"output": y} | {f"last state[{i}]": v for i, v in enumerate(lasts)}
    gradients = {
        f"gradient of {name}": torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(inputs.items(), found, strict=True)
    }
    return {name: v.detach() for name, v in (values | gradients).items()}


def _compare(name: str, actual: Tensor, expected: Tensor, rtol: float) -> float:
    if not expected.any():
        assert not actual.any(), f"{name}: should be exactly zero"
        return 0.0
    return assert_close(name, actual, expected, rtol=rtol)
