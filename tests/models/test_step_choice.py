"""Whether a step of generation is compiled, and why."""

from dataclasses import replace

import pytest

from pararnn.lm.decoding import choose_step
from pararnn.planning.costs import COSTS

COST = replace(COSTS, decoding_compile_s=1.0, decoding_saved_us=100.0)


@pytest.mark.parametrize("blocks", [1, 24])
def test_a_step_is_compiled_where_the_text_is_long_enough(blocks):
    plain, compiled = (choose_step("cuda", blocks, n, COST) for n in (10_000, 10_001))
    assert (plain.compiled, compiled.compiled) == (False, True)
    assert str(compiled) == (
        f"compiled: over 10,001 tokens that saves {blocks} s, more than the {blocks} s that "
        f"compiling {blocks} block{'s' if blocks > 1 else ''} takes"
    )
    assert str(plain).startswith("not compiled: over 10,000 tokens that saves")


def test_elsewhere_and_without_triton_it_is_not(monkeypatch):
    choice = choose_step("cpu", 24, 10**9, COST)
    assert str(choice) == "not compiled: a step is compiled on a GPU only, and this is cpu"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs Triton" in str(choose_step("cuda", 24, 10**9, COST))
