"""Backends: evaluate a recurrence, chunk by chunk."""
