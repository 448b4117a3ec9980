"""Chunks of elementwise recurrences on a CPU, in generated C."""
