"""Checkpoints of the host's generations: what wrote one, and the same one for another generation.

``names``       what a parameter is called in each generation, the one table
``layouts``     where the newest tensors have the values of older ones
``storage``     checkpoints of torch.distributed.checkpoint (DCP) on a disk, entry by entry
``contents``    what a checkpoint holds
``tensors``     whole tensors of a DCP checkpoint, read and written; a run's newest checkpoint
``folder``      a folder that is there when it is finished
``plan``        which entry becomes which under another generation's names
``state``       what besides names differs: the position in the data, the learning rate's schedule
``remapping``   carrying out a plan
``huggingface`` the model alone, to and from safetensors
"""

from ezpz_moe.tools.checkpoints.contents import Contents, inspect
from ezpz_moe.tools.checkpoints.remapping import Remapped, remap

__all__ = ["Contents", "Remapped", "inspect", "remap"]
