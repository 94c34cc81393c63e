"""What a trained router does with a text: ``ezpz-moe analyze``.

The formulas know neither the host nor a model; they take the experts that were chosen:

``tokens``       how much a token's ID says about its experts, how narrow an expert's tokens are
``drops``        what a capacity factor would drop, by position
``consistency``  whether neighbouring tokens need the same experts
``similarity``   cosines between experts' weights
``drift``        what another checkpoint routes otherwise

``text`` makes sequences of a file, ``record`` runs the model, ``report`` puts it together, and
``plots`` draws it.
"""
