"""Measure a machine for ``ezpz-moe plan``: what its ranks compute, and what their links carry.

:mod:`.calibrate` starts the ranks, :mod:`.rank` is what each of them does, with :mod:`.computing`
and :mod:`.links`; :mod:`.written` writes the file of a :class:`.machine.Machine`.
"""
