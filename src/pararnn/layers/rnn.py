"""TEMPORARY: sequential stand-in with the public interface; the real layer replaces it."""
import torch
from torch import nn

class RNN(nn.Module):
    def __init__(self, cell, *, hidden_size=None, num_components=None, batch_first=True, solver=None, backend="auto"):
        super().__init__()
        self.cell, self.batch_first, self.backend = cell, batch_first, backend
        self.hidden_size = hidden_size or cell.hidden_size
        self.num_components = num_components or getattr(cell, "num_components", 1)

    def forward(self, x, state=None, resets=None):
        if not self.batch_first: x = x.transpose(0, 1)
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.hidden_size)
            state = zeros if self.num_components == 1 else (zeros,) * self.num_components
        first, ys = state, []
        for t in range(x.shape[1]):
            if resets is not None:
                r = resets[:, t, None]
                state = torch.where(r, first, state) if self.num_components == 1 else tuple(torch.where(r, a, b) for a, b in zip(first, state))
            state = self.cell(x[:, t], state)
            ys.append(state if self.num_components == 1 else state[0])
        y = torch.stack(ys, 1)
        return (y if self.batch_first else y.transpose(0, 1)), state

    def step(self, x_t, state=None):
        if state is None:
            zeros = x_t.new_zeros(x_t.shape[0], self.hidden_size)
            state = zeros if self.num_components == 1 else (zeros,) * self.num_components
        state = self.cell(x_t, state)
        return (state if self.num_components == 1 else state[0]), state
