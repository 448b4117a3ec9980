"""Products with one vector, with Triton compiled for the GPU."""

import pytest
from core.test_matvec import (  # noqa: F401
    test_a_row_of_a_table_is_read_where_it_is,
    test_a_scaled_entry_of_a_window_is_taken_in,
    test_double_is_left,
    test_equals_float64,
    test_products_of_results_are_left,
    test_several_texts_equal_float64,
    test_sums_of_two_tiles,
    test_tiles_on_their_way,
    test_weights_of_bytes_are_read_as_they_are,
    test_weights_that_are_no_words,
    test_weights_that_start_within_a_word,
    test_what_does_not_fit_is_left,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_the_gpu"),
    pytest.mark.filterwarnings("default"),  # the compiler's own are errors to it
]
