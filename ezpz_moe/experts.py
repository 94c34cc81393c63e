"""The experts classes of the installed host, under one name.

>>> from ezpz_moe.experts import EzpzGroupedExperts, ExpertComputeBackend
"""

from ezpz_moe.hosts import binding

_experts = binding("experts")
ExpertComputeBackend = _experts.ExpertComputeBackend
EzpzGroupedExperts = _experts.EzpzGroupedExperts

__all__ = ["ExpertComputeBackend", "EzpzGroupedExperts"]
