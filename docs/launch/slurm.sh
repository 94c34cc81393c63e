#!/bin/bash
#SBATCH --job-name=ezpz_moe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --signal=TERM@360
# sbatch --account=PROJECT --time=02:00:00 slurm.sh my/job.toml [the trainer's flags]
#
# One launcher on each node starts a process for each GPU. --no-kill leaves the other nodes the time
# to say which one was lost. --signal asks for SIGTERM 360 seconds before the limit: the run saves
# the step that it is at, which it has 300 seconds for, and ends. Submit the same line to go on.
set -euo pipefail

GPUS_PER_NODE=8
# Modules, the environment of Python, and what docs/guides/clusters.md lists for the device: here.

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_ADDR GPUS_PER_NODE

# Single quotes: SLURM_NODEID is each node's own.
# shellcheck disable=SC2016
srun --label bash -c '
    exec ezpz-moe train "$@" --nproc "$GPUS_PER_NODE" --nnodes "$SLURM_NNODES" \
        --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR"
' bash "$@"
