"""``ezpz-moe bench``: the time and memory of one layer, for every contender that runs here.

The layer is the experts' FFN over sorted rows, or a routed layer, from tokens to tokens.
:mod:`.shapes`, :mod:`.routings` and :mod:`.routed_case` define what is computed;
:mod:`.contenders`, :mod:`.routed` and :mod:`.peers` who computes it, and :mod:`.checking` whether
that is right. :mod:`.measuring` measures, :mod:`.plan` runs a whole comparison, and :mod:`.plots`
draws its :mod:`.results`.
"""
