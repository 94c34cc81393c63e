"""Checkpoints of torch.distributed.checkpoint (DCP) that anybody may have written, read safely.

``paths``       what a folder holds, by its files alone; without torch
``metadata``    reading ``.metadata``, for our commands and for a run before it resumes
``unpickling``  which classes a pickle may name; nothing else that it names is run
``kinds``       the classes of metadata: ``torch_kinds`` are torch's, ``stand_ins`` need no torch
``structure``   whether what the metadata says is possible
"""
