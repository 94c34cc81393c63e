"""Binding to torchtitan's main branch after 0.3: what differs from :mod:`..titan_0_3`."""
