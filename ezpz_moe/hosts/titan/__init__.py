"""Bind to torchtitan since 0.3. ``v0_3.py`` and the newer files have one class per generation.

Each class has what differs from the previous one, and its methods import the modules here. If a
newer generation needs a module in another form, there are two: ``attention.py`` and
``attention_2026_08.py``, the newer one with its date. To get the right one, ask the current host,
:func:`ezpz_moe.hosts.titan.base.titan`.
"""
