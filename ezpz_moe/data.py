"""Door for Python: the host's data loaders with what ``[router] padding = "labels"`` needs.

>>> from ezpz_moe.data import labelled
"""

from typing import Any


def labelled(dataloader: Any) -> Any:
    """Return the config of the same data loader of the host, whose batches say what counts.

    A label counts unless it is the host's ignore index. For a data loader that a job file cannot
    name, such as the host's ``ChatDataLoader``; a job's own has this already.

    Args:
        dataloader: a config of any data loader of torchtitan 0.3 or later.
    """
    from ezpz_moe.hosts.titan.labelled import labelled

    return labelled(dataloader)
