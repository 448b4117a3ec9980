"""Kernels in Triton: written once for all cells, around steps that are generated."""
