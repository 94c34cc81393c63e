"""The tables of docs/reference, made from the code: ``scripts/make_reference.py`` writes them."""
