"""Bounds on parameters that an optimiser does not know of, kept by a projection after its step."""

from torch import nn


def project_parameters(module: nn.Module) -> None:
    """Bring the parameters of `module` back inside their cells' bounds, in place.

    Calls `project_()` of every submodule that has one; ParaGRU and ParaLSTM clip their diagonal
    weights. Call it after `optimizer.step()`: unlike a clamp inside the forward pass it leaves the
    gradient of a weight at its bound alive.
    """
    for submodule in module.modules():
        project = getattr(submodule, "project_", None)
        if callable(project):
            project()
