"""A comparison that cannot pass by accident."""

import torch
from torch import Tensor


def assert_close(
    name: str, actual: Tensor, expected: Tensor, *, rtol: float, atol: float = 0.0
) -> float:
    """Compare two tensors by their largest difference.

    Args:
        name: What is compared, for the message.
        actual: What was computed.
        expected: The reference: finite and not all zero.
        rtol: Allowed difference relative to the reference's largest entry.
        atol: Allowed difference besides.

    Returns:
        The largest difference relative to the reference's largest entry.

    Raises:
        AssertionError: They differ in shape, type or value, or the reference proves nothing.
    """
    actual, expected = actual.detach(), expected.detach()
    same = actual.shape == expected.shape and actual.dtype == expected.dtype
    assert same, f"{name}: {actual.shape} {actual.dtype} vs {expected.shape} {expected.dtype}"
    assert expected.isfinite().all(), f"{name}: the reference is not finite"
    assert actual.isfinite().all(), f"{name}: not finite, but the reference is"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    scale = expected.to(wide).abs().amax()
    assert scale > 0, f"{name}: the reference is all zero, so the comparison proves nothing"
    worst = (actual.to(wide) - expected.to(wide)).abs().amax()
    allowed = atol + rtol * scale
    assert worst <= allowed, f"{name}: max error {worst:.3g}, allowed {allowed:.3g}"
    return float(worst / scale)
