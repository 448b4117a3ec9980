"""Benchmarks of language models: training steps and decoding."""
