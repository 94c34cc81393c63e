"""Write a checkpoint with fewer experts, and its flavor and job: ``ezpz-moe ckpt prune``.

``whole``    the model to make smaller, and what it cannot become
``choice``   which experts of a layer stay, by what each has
``layers``   what becomes of each layer
``merging``  adding removed experts' weights to the kept ones that are most like them
``constants`` constant experts in the place of removed ones
``settings`` the flavor and the job of the smaller model
``effects``  what changes for tokens that chose none of the removed experts
``prune``    carrying it out
"""
