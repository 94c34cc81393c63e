"""The host's own way between its parameters and Hugging Face's; its parameters have other names."""

from ezpz_moe.hosts.titan_0_3.huggingface import adapter

__all__ = ["GENERATION", "adapter"]

GENERATION = "main"
"""Whose names the host's parameters have."""
