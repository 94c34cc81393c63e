"""``ezpz-moe bench``: one expert layer, timed and weighed, by every contender that runs here.

:mod:`.shapes` and :mod:`.routings` say what is computed, :mod:`.contenders` and :mod:`.peers` who
computes it, :mod:`.measuring` takes the figures, :mod:`.plan` runs a whole comparison, and
:mod:`.plots` draws its :mod:`.results`.
"""
