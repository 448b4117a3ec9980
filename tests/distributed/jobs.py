"""What processes do, and what comes of it when their parts are put together again."""

import torch
from core import cells
from core.compare import as_tuple, joined
from torch import nn

from pararnn import RNN, ParaGRU, ParaLSTM, parallelize
from pararnn.distributed import sequence_parallel

TIME = 53


class Dense(nn.Module):
    """A state of tensors of two sizes whose entries all reach each other."""

    input_size, hidden_size, num_components = cells.INPUT, (3, 2), 2

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(cells.INPUT, 5)
        self.recurrent = nn.Linear(5, 5)

    def forward(self, x, state):
        new = torch.tanh(self.input(x) + 2 * self.recurrent(torch.cat(state, -1)))
        return new[:, :3], new[:, 3:]


OTHERS = {"chaotic": cells.Chaotic, "gru": lambda: nn.GRUCell(cells.INPUT, 6), "dense": Dense}
FORGETTING = ["paragru", "paralstm", "weight_norm", "gru"]
REMEMBERING = ["slow_gates", "dense", "m2rnn", "outer_memory", "block_gru", "exponential"]
CELLS = [*FORGETTING, *REMEMBERING, "chaotic"]


def make_cell(name):
    if name not in OTHERS:
        return cells.make_cell(name)
    torch.manual_seed(3)
    return OTHERS[name]().double()


def make_rnn(name, **options):
    return RNN(make_cell(name), **options)


def make_stack(name):
    torch.manual_seed(3)
    if name == "parallelized":
        own = nn.GRU(cells.INPUT, 4, 2, bidirectional=True, batch_first=True)
        return parallelize(own).double()
    kind = {"paragru": ParaGRU, "paralstm": ParaLSTM}[name]
    return kind(cells.INPUT, 4, 2, batch_first=True, bidirectional=True).double()


def weights(count):
    """The part that each rank has in a loss of the last state."""
    return [(2 * rank + 1) / count**2 for rank in range(count)]


def call(group, rank, make, given, cuts, cotangents, options=None):
    """Run a layer on this rank's part of time and back.

    Args:
        group: The processes.
        rank: This one.
        make: Makes the layer.
        given: x, state and what else the layer takes, by name.
        cuts: Boundaries of time.
        cotangents: Of y and of the tensors of the last state.
        options: `axis` of time; `frozen`, names of what takes no gradient.
    """
    options = options or {}
    layer, axis, count = make(), options.get("axis", 1), group.size()
    sequence_parallel(layer, group)
    part = slice(cuts[rank], cuts[rank + 1])

    def mine(tensor):
        return tensor[(slice(None),) * axis + (part,)]

    given = dict(given)
    leaves = {"x": mine(given["x"]).clone().requires_grad_()}
    for name in ("state", "reset_state"):
        if given.get(name) is not None:
            parts = tuple(s.clone().requires_grad_() for s in as_tuple(given[name]))
            leaves |= {f"{name}[{i}]": s for i, s in enumerate(parts)}
            given[name] = joined(parts)
    given["x"] = leaves["x"]
    if given.get("resets") is not None:
        given["resets"] = mine(given["resets"])
    x = given.pop("x")
    y, last = layer(x, given.pop("state"), **given)
    total = (y * mine(cotangents[0])).sum()
    share = weights(count)[rank]
    total = total + sum(
        (s * c).sum() * share for s, c in zip(as_tuple(last), cotangents[1:], strict=True)
    )
    leaves |= {n: p for n, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    values = {"y": y.detach()} | {f"last[{i}]": s.detach() for i, s in enumerate(as_tuple(last))}
    for (name, tensor), gradient in zip(leaves.items(), found, strict=True):
        values[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    report = layer.report if isinstance(layer, RNN) else None
    return {n: v.contiguous().numpy() for n, v in values.items()}, str(report)


def together(results, axis=1):
    """The values of all ranks as those of one process."""
    for result in results:
        assert isinstance(result[0], dict), result
    every = [{n: torch.from_numpy(v) for n, v in values.items()} for values, _ in results]
    found = {}
    for name in every[0]:
        own = [values[name] for values in every]
        if name in ("y", "gradient of x"):
            found[name] = torch.cat(own, axis)
        elif name.startswith("gradient"):
            found[name] = torch.stack(own).sum(0)
        else:
            assert all(torch.equal(o, own[0]) for o in own), f"{name} differs between ranks"
            found[name] = own[0]
    return found
