"""Flavors and jobs: reading and checking what users write. Imports neither torch nor the host."""
