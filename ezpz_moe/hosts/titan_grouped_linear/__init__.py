"""Binding to torchtitan since September 2026: what differs from :mod:`..titan_main`."""
