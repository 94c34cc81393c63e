"""Checkpoints of the host's generations: which one wrote a checkpoint, and converting between them.

``names``       what each generation calls a parameter, in one table
``layouts``     where the newest tensors hold the values of older ones
``storage``     checkpoints of torch.distributed.checkpoint (DCP) on a disk, entry by entry
``contents``    what a checkpoint holds
``tensors``     reading and writing whole tensors of a DCP checkpoint; a run's newest checkpoint
``folder``      a folder that appears only when it is complete
``plan``        which entry becomes which under another generation's names
``state``       what differs besides names: the position in the data, the learning rate's schedule
``remapping``   carrying out a plan
``huggingface`` the model alone, as a folder that transformers opens, and back
"""

from ezpz_moe.tools.checkpoints.contents import Contents, inspect
from ezpz_moe.tools.checkpoints.remapping import Remapped, remap

__all__ = ["Contents", "Remapped", "inspect", "remap"]
