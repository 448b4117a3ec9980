"""Values and gradients of a layer and of the loop, by name, and how close they must be."""

import torch

from pararnn.testing import assert_close, loop

RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def random_state(num_components, *shape, dtype=torch.float64):
    """A state as cells take it: a tensor for one component, else a tuple."""
    parts = tuple(torch.randn(*shape, dtype=dtype) for _ in range(num_components))
    return parts if num_components > 1 else parts[0]


def state_of(rnn, batch, dtype=torch.float64):
    """A random state as a layer takes it."""
    return joined([torch.randn(batch, *shape, dtype=dtype) for shape in rnn.state_shapes])


def joined(parts):
    return tuple(parts) if len(parts) > 1 else parts[0]


def with_resets(run, resets):
    """`run` of x and one tuple: the state before the first step, then what resets restart from."""

    def both(x, state):
        half = len(state) // 2
        first, fresh = joined(state[:half]), joined(state[half:])
        return run(x, first, resets, reset_state=fresh)

    return both


def cotangents_of_torch(seed=1):
    """Random numbers like a value, that half precision has too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(_name, v):
        drawn = torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(v.device).to(torch.bfloat16).to(v.dtype)

    return draw


def outcome(run, module, x, state, draw=None):
    """Run `run(x, state) -> (y, state)` and its backward with random cotangents.

    Args:
        run: What is run.
        module: Has the parameters.
        x: Inputs.
        state: The state before, or a tuple.
        draw: Makes the cotangent of a value from its name and itself.

    Returns:
        Values and the gradients of x, the state and every parameter, by name; a parameter that
        got no gradient counts as one that got zeros.
    """
    x = x.detach().clone().requires_grad_()
    first = tuple(s.detach().clone().requires_grad_() for s in as_tuple(state))
    y, last = run(x, first if isinstance(state, tuple) else first[0])
    values = {"y": y} | {f"last[{i}]": s for i, s in enumerate(as_tuple(last))}
    draw = draw or cotangents_of_torch()
    total = sum((v * draw(name, v)).sum() for name, v in values.items())
    inputs = {"x": x} | {f"first[{i}]": s for i, s in enumerate(first)}
    inputs |= {n: p for n, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    for (name, tensor), gradient in zip(inputs.items(), found, strict=True):
        values[f"gradient of {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: v.detach() for name, v in values.items()}


def twice(run, x, state):
    """A gradient by x, and the gradient of that, of `run(x, state) -> (y, state)`."""
    x = x.detach().clone().requires_grad_()
    (once,) = torch.autograd.grad(run(x, state)[0].sin().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(once.sin().sum(), x)
    return {"once": once.detach(), "twice": again}


def one_by_one(cell, lengths):
    """A loop over sequences packed one after another, as `run` of `outcome`."""

    def run(x, state):
        outputs, lasts = [], []
        for i, part in enumerate(x.split(lengths, 1)):
            last = tuple(s[i : i + 1] for s in as_tuple(state))
            if part.shape[1]:
                y, last = loop(cell, part, last if isinstance(state, tuple) else last[0])
                outputs.append(y)
            lasts.append(as_tuple(last))
        last = tuple(torch.cat(c) for c in zip(*lasts, strict=True))
        return torch.cat(outputs, 1), last if isinstance(state, tuple) else last[0]

    return run


def assert_same(actual, expected, rtol, zero=(), label=""):
    """Compare two outcomes; the gradients named in `zero` must be exactly that in both."""
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        if name in zero:
            assert not reference.any(), f"{label}{name}: the reference is not zero"
            assert not actual[name].any(), f"{label}{name}: not exactly zero"
        else:
            assert_close(label + name, actual[name], reference, rtol=rtol)
