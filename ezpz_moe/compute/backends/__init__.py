"""One file per backend: its kernels, its limits, nothing else."""
