"""Checkpoints of the host's generations: which one wrote a checkpoint, and converting between them.

``names``       what each generation calls a parameter, in one table
``layouts``     where the newest tensors hold the values of older ones
``storage``     checkpoints of torch.distributed.checkpoint (DCP) on a disk, entry by entry
``data_files``  the files with its entries: whether they are whole
``contents``    what a checkpoint holds; without torch, where the checkpoint is as usual
``tensors``     reading and writing whole tensors of a DCP checkpoint; a run's newest checkpoint
``folder``      a folder that appears only when it is complete
``expert_rows`` which tensors count experts, in which dimension, and taking some of these
``plan``        which entry becomes which under another generation's names
``state``       what differs besides names: the position in the data, the learning rate's schedule
``remapping``   carrying out a plan
``expert_order`` which orders experts may have, and the file that leads back to the first
``reordering``  writing a checkpoint with its experts in another order
``huggingface`` the model alone, as a folder that transformers opens, and back
"""
