"""What is generated for four cells, as text for golden files: it is short there to be read."""

from pathlib import Path

import torch
from torch import nn

from pararnn import RNN
from pararnn.cells import HeadSLSTMCell, ParaGRUCell, SLSTMCell
from pararnn.kernels import c as c_package
from pararnn.kernels import fused
from pararnn.kernels.c.backend import CBackend
from pararnn.kernels.triton.backend import TritonBackend
from pararnn.kernels.triton.sweeps import Spreads, streamed_source
from pararnn.solvers.chunks import Chunks, Cut

CELLS = {
    "gru": lambda: ParaGRUCell(3, 4),
    "slstm": lambda: SLSTMCell(3, 4),
    "heads": lambda: HeadSLSTMCell(4, 4, num_heads=2),
    "dense": lambda: nn.GRUCell(3, 4),
}


def texts():
    """Texts by the names of their files."""
    found = {}
    for name, make in CELLS.items():
        torch.manual_seed(0)
        traced = RNN(make()).runner().traced
        if traced.step.recurrence is None:
            found |= _rows(name, traced.step)
        else:
            found[f"{name}.py"] = TritonBackend(traced.step.recurrence).source()
            found[f"{name}.c"] = _without_written(CBackend(traced.step.recurrence).source())
    return {name: text.rstrip() + "\n" for name, text in found.items()}


def _without_written(text):
    """C without what is the same for all cells."""
    loops = set()
    for file in sorted(Path(c_package.__file__).parent.glob("*.[ch]")):
        assert file.read_text() in text or file.suffix == ".c"
        if file.suffix == ".c" and file.read_text() in text:
            loops.add(file.name)
        text = text.replace(file.read_text(), f'#include "{file.name}"\n')
    assert len(loops) == 1
    return text


def _rows(name, of):
    """The steps, forwards and of the adjoint."""
    count, cut, steps, in_c, wide, spread = of.num_components, Cut(2, 3, 3), [], [], [], []
    rows = torch.rand(6, of.hidden)
    inputs = [torch.rand(*([6] if i.by_rows else []), *i.shape) for i in of.inputs]
    adjoint = of.adjoint
    given = adjoint.part_arguments([rows] * count, inputs, [rows] * count)
    found = adjoint.part.module(*given)
    both = (of, inputs), (adjoint.step, [found[i] for i in adjoint.step_inputs])
    for step, inputs in both:
        over_time = [
            i.unflatten(0, (2, 3)) if by_rows else i
            for i, by_rows in zip(inputs, step.by_rows, strict=True)
        ]
        chunks, state = Chunks(step, cut, over_time, None, ()), [rows[:2]] * count
        in_c.append(_without_written(fused._kernel(chunks, state, "c").source))
        kernel = fused._kernel(chunks, state)
        steps.append(kernel.source)
        wide.append(streamed_source(kernel.products, double=False))
        spread.append(Spreads(kernel.products, double=False).source(2))  # channels
    found = {f"{name}.py": steps, f"{name}.c": in_c, f"{name}_wide.py": wide}
    found |= {f"{name}_spread.py": spread}
    return {file: "\n\n".join(parts) for file, parts in found.items()}
