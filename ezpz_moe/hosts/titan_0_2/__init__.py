"""Bind the plugin to torchtitan 0.2."""
