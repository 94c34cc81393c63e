"""Compare the cuts of a run before it exists: ``ezpz-moe plan``.

A *cut* says how ranks share model and batch. ``cuts`` lists those that the host accepts, ``memory``
says what a rank holds, ``traffic`` what it sends, ``steps`` how long that takes on a ``machine``
under a ``load``; ``plans`` puts it together and ``written`` makes a job of the winner.
docs/guides/plan.md states the model, and what is not in it.
"""
