"""torchtitan since 0.3. ``v0_3.py`` and its newer sisters have a class for each generation.

A class has what differs from the one before, and its methods import the modules beside it. A module
that a newer generation needs otherwise stands twice, the newer one with its date:
``attention.py`` and ``attention_2026_08.py``. What asks for one of these asks the host at hand,
:func:`ezpz_moe.hosts.titan.base.titan`.
"""
