"""Binding to torchtitan 0.2."""
