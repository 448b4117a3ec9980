"""Benchmarks that a user can run on their own device."""

from pararnn.bench.problem import Size as Size
from pararnn.bench.report import save as save
from pararnn.bench.suite import measure as measure
