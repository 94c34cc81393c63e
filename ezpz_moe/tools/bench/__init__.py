"""``ezpz-moe bench``: the time and memory of one expert layer, for every contender that runs here.

:mod:`.shapes` and :mod:`.routings` define what is computed, :mod:`.contenders` and :mod:`.peers`
who computes it, :mod:`.measuring` measures, :mod:`.plan` runs a whole comparison, and
:mod:`.plots` draws its :mod:`.results`.
"""
