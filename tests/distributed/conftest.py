"""One group of four processes for all tests."""

import pytest

from .group import Group


@pytest.fixture(scope="session")
def group(tmp_path_factory):
    with Group(4, tmp_path_factory.mktemp("group")) as started:
        yield started
