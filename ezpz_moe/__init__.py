"""Selectable expert backends for Mixture-of-Experts training with an unmodified torchtitan.

Importing this package imports neither torch nor torchtitan. The kernels are in
``ezpz_moe.compute``, the host bindings in ``ezpz_moe.hosts``.
"""

__version__ = "0.1.0"
