"""Turn a dense model's checkpoint into a mixture of experts: ``ezpz-moe upcycle``.

``weights``    the formulas, tensor by tensor
``fit``        how the dense FFN becomes the experts, and the factor on their weights
``dense``      reading the dense model, from a DCP checkpoint or from safetensors
``several``    what several dense models have in common, and their mean
``upcycle``    carrying it out; ``notes`` says what follows
"""

from ezpz_moe.tools.upcycling.upcycle import Upcycled, upcycle
from ezpz_moe.tools.upcycling.weights import Perturbation

__all__ = ["Perturbation", "Upcycled", "upcycle"]
