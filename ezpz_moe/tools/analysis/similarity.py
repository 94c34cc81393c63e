"""How similar the experts of a layer are, by their weights. Legend: E = experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def cosines(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Compute the cosine between every two experts' weights: [E, E] in float64.

    All weights of an expert form one vector. Hidden channels are compared position by position:
    experts with the same channels in another order are as far apart as any two. High values mean a
    common origin, such as upcycling, that training has not pulled apart.

    Args:
        weights: tensors [E, ...] of the layer, of any floating dtype.

    Returns:
        NaN in the rows and columns of an expert whose weights are all zero.
    """
    # Add the dot products of w1, w2 and w3: concatenating the weights would copy all of them.
    dots_EE = sum(flat @ flat.T for flat in (each.flatten(1).double() for each in weights))
    assert isinstance(dots_EE, torch.Tensor)
    # The diagonal has each weight's product with itself, so no norm is computed twice.
    norms_E = dots_EE.diagonal().sqrt()
    return dots_EE / torch.outer(norms_E, norms_E)


def off_diagonal(cosines_EE: torch.Tensor) -> torch.Tensor:
    """Return the cosines of two different experts, each pair once."""
    first, second = torch.triu_indices(*cosines_EE.shape, offset=1)
    return cosines_EE[first, second]
