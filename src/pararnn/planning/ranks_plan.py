"""How a sequence is solved whose time is split over ranks."""

from __future__ import annotations

from pararnn.planning.costs import COSTS, Costs
from pararnn.planning.plan import Way
from pararnn.planning.settings import Jacobi, Newton


def plan_ranks(time: int, tolerance: float, has_tangents: bool, costs: Costs = COSTS) -> Way:
    """Warm-up and coupling of the ranks.

    Args:
        time: Steps of this rank; the warm-up need not be the same on all.
        tolerance: Of a solve on one device.
        has_tangents: Whether a rank can know the tangent of its steps.
        costs: What work costs.
    """
    half, single, double = costs.tile_warm_up
    least = half if tolerance > 1e-4 else single if tolerance > 1e-8 else double
    steps = min(time, max(least, int(time * costs.rank_warm_up)))
    return Way(Newton() if has_tangents else Jacobi(), tolerance, warm_up=steps)
