"""What a trained router does with a text: ``ezpz-moe analyze``.

The formulas know neither the host nor a model; they take the chosen experts:

``tokens``       how well a token's ID predicts its experts, how narrow an expert's tokens are
``drops``        what a capacity factor would drop, by position
``consistency``  whether neighbouring tokens need the same experts
``similarity``   cosines between experts' weights
``drift``        what another checkpoint routes differently

``text`` makes sequences from a file, ``record`` runs the model, ``report`` collects the measures,
and ``plots`` draws them.
"""
