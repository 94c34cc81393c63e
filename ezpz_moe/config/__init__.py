"""Flavors and jobs: what users write, read and checked. Nothing here imports torch or the host."""
