"""The table of the core tests, with Triton compiled for the GPU."""

import pytest
from core.test_contracts import (  # noqa: F401
    name,
    test_equals_loop,
    test_equals_loop_over_1000_steps,
    test_half_precision,
    test_layouts,
    test_no_state_means_zeros,
    test_packed_equals_one_by_one,
    test_resets_equal_loop,
    test_whole_equals_steps,
    test_whole_equals_two_parts,
)
from core.test_operations import test_operation_equals_loop  # noqa: F401
from core.test_solver import (  # noqa: F401
    test_chaotic_cell_equals_loop,
    test_damping_leaves_the_solution,
    test_exploding_tangents_end_at_the_loop,
    test_forgetful_cell_converges_in_one_sweep,
    test_infinite_states_equal_the_loop,
    test_loose_tolerance_stops_earlier,
    test_nan_input_reaches_what_the_loop_reaches,
    test_report_of_a_solve,
    test_report_of_one_chunk,
    test_too_few_iterations_are_completed_step_by_step,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_the_gpu"),
    pytest.mark.filterwarnings("ignore:.*determinis"),
]
