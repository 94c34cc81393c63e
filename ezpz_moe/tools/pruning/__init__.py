"""Write a checkpoint with fewer experts, and its flavor and job: ``ezpz-moe ckpt prune``.

``choice``   which experts stay
``merging``  adding removed experts' weights to the kept ones that are most like them
``settings`` the flavor and the job of the smaller model
``effects``  what changes for tokens that chose none of the removed experts
``prune``    carrying it out
"""
