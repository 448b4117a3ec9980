"""`StackedRNN`: layers and directions of `RNN`; `ParaGRU` and `ParaLSTM` with the paper's cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pararnn._whole import check_whole
from pararnn.cells import ParaGRUCell, ParaLSTMCell
from pararnn.cells._named import NamedInit
from pararnn.layers.arguments import State, check_resets, num_sequences, other_axes, sizes_in
from pararnn.layers.by_layer import ByLayer
from pararnn.layers.rnn import RNN
from pararnn.planning.plan import Plan
from pararnn.planning.settings import Solver
from pararnn.solvers.ranks import Ranks
from pararnn.solvers.report import SolveReport
from pararnn.tracing.modes import outside_of_graphs


class StackedRNN(nn.Module):
    """Layers of recurrences in one or both directions, called like `nn.GRU`.

    Args:
        layers: One `RNN` (batch first) per layer and direction: layer by layer, forwards first.
        batch_first: Inputs and outputs are (batch, time, size) instead of (time, batch, size).
        dropout: Probability of zeroing an output between layers, in training.
        bidirectional: Every second of `layers` runs backwards in time.
    """

    def __init__(
        self,
        layers: Sequence[RNN],
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.num_layers = len(layers) // (2 if bidirectional else 1)
        self.input_size = int(layers[0].cell.input_size)  # type: ignore[arg-type]
        self.hidden_size = layers[0].hidden_size

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        reset_state: State | None = None,
    ) -> tuple[Any, State]:
        """Evaluate all layers at all times.

        Args:
            x: Inputs, (time, batch, input_size), (batch, time, input_size) with `batch_first`,
                (time, input_size) for a single sequence, or a `PackedSequence`.
            state: State before the first step, (num_layers * directions, batch, hidden_size), or a
                pair of them for an LSTM; without batch axis for a single sequence; zeros when None.
            resets: Boolean, (time, batch), laid out like x. Where true, a new sequence begins: the
                state before this step is `reset_state`. A backward layer restarts at the step
                before this one, the last of the previous sequence.
            cu_seqlens: Boundaries of sequences packed into an x of batch 1; see `RNN.forward`.
            reset_state: State at resets, like `state`, or without batch axis for all sequences;
                zeros when None.

        Returns:
            The last layer's outputs (both directions concatenated), laid out like x, and the last
            states, like `state`.

        Raises:
            TypeError: x, a state or resets are not tensors, or not the right number of them.
            ValueError: Shapes do not fit, or resets are given with a `PackedSequence`.
        """
        if isinstance(x, PackedSequence):
            if not (resets is None and cu_seqlens is None and reset_state is None):
                raise ValueError(
                    "x is a PackedSequence, which says itself where sequences begin; to use "
                    "resets, reset_state or cu_seqlens, pass x as a tensor."
                )
            if getattr(self.layers[0], "ranks", None) is not None:
                raise TypeError(
                    "x is a PackedSequence, whose time cannot be split over ranks; put the "
                    "sequences one after another and pass cu_seqlens."
                )
            return self._packed(x, state)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be a tensor or a PackedSequence, got a {type(x).__name__}; use "
                "torch.as_tensor(x)."
            )
        single = x.dim() == 2
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(f"x has shape {tuple(x.shape)}; pass {self._layouts()}.")
        check_resets(resets, x.shape[:-1], cu_seqlens, self.batch_first)
        if single:
            x = x.unsqueeze(0)
            state = _each(state, lambda s: s.unsqueeze(1) if cu_seqlens is None else s)
            resets = None if resets is None else resets.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        y, last = self._run(x, state, resets, cu_seqlens, reset_state)
        if single:
            y = y.squeeze(0)
            last = _each(last, lambda s: s.squeeze(1) if cu_seqlens is None else s)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, last

    def step(self, x_t: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Evaluate one step.

        Args:
            x_t: Inputs, (batch, input_size).
            state: As in `forward`.

        Returns:
            The outputs, (batch, hidden_size), and the new state, like `state`.

        Raises:
            ValueError: The layer is bidirectional: each step needs the future.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot go step by step; it needs the future.")
        y, last = self._run(x_t.unsqueeze(1), state, None, None)
        return y.squeeze(1), last

    @property
    def report(self) -> ByLayer[SolveReport] | None:
        """How the last call went in each layer and direction; None before one or when compiled."""
        found = [r for layer in self._rnns() if (r := layer.report) is not None]
        return ByLayer(found, self._directions) if len(found) == len(self.layers) else None

    def plan(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> ByLayer[Plan]:
        """How a call would be carried out in each layer and direction, and why; `print` it.

        Args:
            shape: Of x, as `forward` takes it.
            dtype: Of x; that of the cells when None.

        Raises:
            TypeError: `shape` is no shape, or `dtype` no type.
            ValueError: A shape that the layers refuse.
        """
        sizes = sizes_in("shape", shape)
        if len(sizes) not in (2, 3) or sizes[-1] != self.input_size:
            raise ValueError(f"shape is {sizes}; pass that of x: {self._layouts()}.")
        lead = (1, sizes[0]) if len(sizes) == 2 else sizes[:2] if self.batch_first else sizes[1::-1]
        features = [self.input_size] * self._directions
        features += [self.hidden_size * self._directions] * (len(self.layers) - len(features))
        pairs = zip(self._rnns(), features, strict=True)
        plans = [layer.plan((*lead, size), dtype) for layer, size in pairs]
        return ByLayer(plans, self._directions)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _rnns(self) -> list[RNN]:
        held: Any = self._modules["layers"]
        return list(held)

    def _layouts(self) -> str:
        first = "(batch, time" if self.batch_first else "(time, batch"
        return f"{first}, {self.input_size}), or (time, {self.input_size}) for a single sequence"

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"batch_first={self.batch_first}, bidirectional={self.bidirectional}"
        )

    def _run(
        self,
        x: Tensor,
        state: State | None,
        resets: Tensor | None,
        cu_seqlens: Tensor | None,
        reset_state: State | None = None,
        backwards: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Evaluate all layers on x (batch, time, size).

        `backwards` (batch, time) holds the order of the steps for backward layers, as indices; None
        reverses time. It must be its own inverse. With it, both directions use the same `resets`.
        """
        directions, layers, batch = self._directions, self._rnns(), x.shape[0]
        time = x.shape[1]
        firsts = self._split("state", state, num_sequences(batch, cu_seqlens), time)
        fresh = self._split("reset_state", _each(reset_state, _for_all(batch)), batch, time)
        lasts: list[State] = []

        def turn(steps: Tensor) -> Tensor:
            if backwards is None:
                return steps.flip(1)
            return steps[torch.arange(batch, device=x.device).unsqueeze(1), backwards]

        for i in range(0, len(layers), directions):
            y, last = layers[i](x, firsts[i], resets, cu_seqlens, reset_state=fresh[i])
            lasts.append(last)
            if self.bidirectional:
                turned = resets
                if resets is not None and backwards is None:
                    ranks, after = layers[i].ranks, torch.zeros_like(resets[:, :1])
                    if ranks is not None:
                        after = _next(resets, ranks)
                    turned = torch.cat([resets[:, 1:], after], 1).flip(1)
                ends = None if cu_seqlens is None else cu_seqlens[-1] - cu_seqlens.flip(0)
                first = firsts[i + 1] if ends is None else _each(firsts[i + 1], lambda s: s.flip(0))
                z, last = layers[i + 1](turn(x), first, turned, ends, reset_state=fresh[i + 1])
                lasts.append(last if ends is None else _each(last, lambda s: s.flip(0)))
                y = torch.cat([y, turn(z)], -1)
            last_layer = i + directions == len(layers)
            x = y if last_layer or not self.dropout else F.dropout(y, self.dropout, self.training)
        if isinstance(lasts[0], tuple):
            return x, tuple(torch.stack(s) for s in zip(*lasts, strict=True))
        return x, torch.stack([s for s in lasts if isinstance(s, Tensor)])

    def _split(self, name: str, state: State | None, rows: int, time: int) -> list[State | None]:
        """Split a state into one per layer and direction; None for each when None."""
        if state is None:
            return [None] * (self.num_layers * self._directions)
        parts = state if isinstance(state, tuple) else (state,)
        shape = (len(self.layers), rows, self.hidden_size)
        count = self.layers[0].num_components
        as_wanted = len(parts) == count and isinstance(state, tuple) == (count > 1)
        if not as_wanted or not all(isinstance(p, Tensor) for p in parts):
            wanted = "a tensor" if count == 1 else f"a tuple of {count} tensors"
            seen = type(state).__name__
            if isinstance(state, (tuple, list)):
                seen += f" of {', '.join(type(p).__name__ for p in state)}"
            raise TypeError(f"{name} must be {wanted} of shape {shape}, got a {seen}.")
        for part in parts:
            if tuple(part.shape) != shape:
                turned = tuple(part.shape) == (shape[0], time, shape[2])
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}; pass {shape}: (layers x directions, "
                    "batch, hidden_size), or None for zeros."
                    f"{other_axes(self.batch_first) if turned else ''}"
                )
        if isinstance(state, tuple):
            return list(zip(*(p.unbind(0) for p in parts), strict=True))
        return list(state.unbind(0))

    def _packed(self, packed: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        padded, lengths = pad_packed_sequence(packed, batch_first=True)
        used = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        used = used.to(padded.device)
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(padded.device)
        y, last = self._run(padded[used].unsqueeze(0), state, None, ends)
        out = y.new_zeros(*padded.shape[:2], y.shape[-1])
        out[used] = y[0]
        result = pack_padded_sequence(out, lengths, batch_first=True, enforce_sorted=False)
        return PackedSequence(
            result.data, result.batch_sizes, result.sorted_indices, result.unsorted_indices
        ), last


class ParaRNNStack(NamedInit, StackedRNN):
    """Layers of one of the paper's cells; see `ParaGRU` for the arguments."""

    make_cell: ClassVar[Callable[..., nn.Module]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        num_heads: int = 1,
        *,
        max_recurrent_weight: float | None = 0.5,
        solver: Solver | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_timescale: float | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        check_whole(num_layers=num_layers)
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        directions = 2 if bidirectional else 1
        layers = []
        for i in range(num_layers * directions):
            size = input_size if i < directions else hidden_size * directions
            cell = type(self).make_cell(
                size,
                hidden_size,
                bias,
                num_heads,
                max_recurrent_weight,
                device,
                dtype,
                max_timescale=max_timescale,
            )
            layers.append(
                RNN(cell, solver=solver, backend=backend, checkpoint_every=checkpoint_every)
            )
        super().__init__(
            layers, batch_first=batch_first, dropout=dropout, bidirectional=bidirectional
        )
        self.bias, self.num_heads = bias, num_heads


class ParaGRU(ParaRNNStack):
    """The paper's GRU with the signature of `nn.GRU`, evaluated for all times at once.

    Args:
        input_size: Size of the inputs.
        hidden_size: Size of the state.
        num_layers: Number of layers; each takes the outputs of the one before.
        bias: Whether to learn biases.
        batch_first: Inputs and outputs are (batch, time, size) instead of (time, batch, size).
        dropout: Probability of zeroing an output between layers, in training.
        bidirectional: Whether each layer also runs backwards in time.
        num_heads: Blocks of every input projection; must divide all sizes.
        max_recurrent_weight: Bound on the diagonal weights, kept after each step of an optimiser.
        solver: See `RNN`.
        backend: See `RNN`.
        device: Device of the parameters.
        dtype: Type of the parameters.
        max_timescale: Longest time of forgetting at initialisation, in steps; see the cell.
        checkpoint_every: See `RNN`.

    Unlike in `nn.GRU`, the recurrent weights are diagonal: a channel of the state sees only its own
    past, and channels mix in the input projection. Weights of an `nn.GRU` cannot be loaded.

    Raises:
        TypeError: A size is no whole number.
        ValueError: num_layers, dropout or num_heads is out of range.

    Source: Danieli et al. 2025, arXiv 2510.21450, eq. 3.1a.
    """

    make_cell = ParaGRUCell


class ParaLSTM(ParaRNNStack):
    """The paper's LSTM with the signature of `nn.LSTM`; the state is the pair `(h, c)`.

    Arguments as for `ParaGRU`.

    Source: Danieli et al. 2025, arXiv 2510.21450, eq. 3.1b (coupled input and forget gate,
    peepholes).
    """

    make_cell = ParaLSTMCell


@outside_of_graphs
def _next(resets: Tensor, ranks: Ranks) -> Tensor:
    """Whether a sequence begins at the first step of the next rank, (batch, 1)."""
    every = ranks.exchange(resets[:, :1])
    return torch.cat([every[1:], torch.zeros_like(every[:1])])[ranks.position]


def _for_all(rows: int) -> Callable[[Tensor], Tensor]:
    """A function that gives a state without batch axis to every row."""
    return lambda s: s.unsqueeze(1).expand(-1, rows, -1) if s.dim() == 2 else s


def _each(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if state is None:
        return None
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)
