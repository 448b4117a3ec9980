"""Modules: a cell over a sequence."""
