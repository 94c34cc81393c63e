"""The experts classes of the installed host, under one name.

>>> from ezpz_moe.experts import EzpzGroupedExperts, ExpertComputeBackend
"""

from ezpz_moe.hosts.titan_0_3.experts import ExpertComputeBackend, EzpzGroupedExperts

__all__ = ["ExpertComputeBackend", "EzpzGroupedExperts"]
