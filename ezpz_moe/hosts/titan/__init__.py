"""Binding to torchtitan 0.3."""
