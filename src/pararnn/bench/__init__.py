"""Benchmarks that a user can run on their own device."""

from pararnn.bench.recurrence import Size as Size
from pararnn.bench.recurrence import measure as measure
from pararnn.bench.report import save as save
