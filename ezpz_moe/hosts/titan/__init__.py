"""torchtitan since 0.3. ``v0_3.py`` and its newer sisters have a class for each generation.

A class has what differs from the one before, and its methods import the modules here. A module that
a newer generation needs in another form exists twice, the newer one with its date:
``attention.py`` and ``attention_2026_08.py``. To get the right one, ask the host at hand,
:func:`ezpz_moe.hosts.titan.base.titan`.
"""
