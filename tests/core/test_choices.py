"""What is chosen for 827 combinations of cell, shape, device and settings is what was recorded."""

from . import golden
from .choices import recorded
from .conftest import needs_triton


@needs_triton
def test_choices_are_as_recorded():
    stored, found = golden.read("choices.json"), recorded()
    assert len(found) >= 500
    assert list(found) == list(stored)
    other = {name: (stored[name], now) for name, now in found.items() if now != stored[name]}
    shown = "\n".join(f"{n}\n  was {was}\n  is  {now}" for n, (was, now) in list(other.items())[:9])
    assert not other, f"{len(other)} choices are others, for instance\n{shown}"
