"""Whether a step of generation is compiled, and why."""

from dataclasses import replace

import pytest

from pararnn.planning.costs import COSTS
from pararnn.planning.decoding_plan import choose_step

COST = replace(COSTS, decoding_compile_s=1.0, decoding_saved_us=100.0)


@pytest.mark.parametrize("blocks", [1, 24])
def test_a_step_is_compiled_where_the_text_is_long_enough(blocks):
    plain, compiled = (choose_step("cuda", blocks, n, COST) for n in (10_000, 10_001))
    assert (plain.value, compiled.value) == ("plain", "compiled")
    assert f"over 10,001 tokens a compiled step saves {blocks} s" in compiled.because
    assert f"compiling {blocks} blocks takes" in plain.because


def test_elsewhere_and_without_triton_it_is_not(monkeypatch):
    choice = choose_step("cpu", 24, 10**9, COST)
    assert (choice.value, choice.because) == (
        "plain",
        "a step is compiled on a GPU only, and this is cpu",
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choice = choose_step("cuda", 24, 10**9, COST)
    assert (choice.value, "needs Triton" in choice.because) == ("plain", True)
