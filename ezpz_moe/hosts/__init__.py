"""Bindings to the host trainer: one folder per host generation, the same file names in each.

Only modules below this package import torchtitan.
"""
