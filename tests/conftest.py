"""Fixtures of every test: fixed seeds, and nothing kept by the compiler."""

import os
import sys

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, which then keeps its mode
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forgetful_compiler():
    """Graphs that torch.compile made for one test do not count towards its limit in the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty folder for compiled kernels, for this test alone."""
    monkeypatch.setenv("PARARNN_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"
