#!/bin/bash -l
#PBS -N ezpz_moe
#PBS -l select=2:system=polaris
#PBS -l place=scatter
#PBS -l filesystems=home:eagle
#PBS -j oe
# qsub -A PROJECT -q QUEUE -l walltime=01:00:00 -v JOB=my/job.toml polaris.sh
#
# Polaris: 4 A100 on each node.
set -euo pipefail
cd "$PBS_O_WORKDIR"

module use /soft/modulefiles
module load conda # sets NCCL up for the network; `env | grep -E "NCCL|FI_"` shows it
conda activate

GPUS_PER_NODE=4
NNODES=$(sort -u "$PBS_NODEFILE" | wc -l)
MASTER_ADDR=$(head -n 1 "$PBS_NODEFILE")

# PBS kills a job seconds after its limit. So the run gets SIGTERM 360 seconds before: it saves the
# step that it is at, which it has 300 seconds for, and ends. Submit the same line to go on.
WALLTIME=$(qstat -f "$PBS_JOBID" | awk '
    /Resource_List.walltime/ { split($3, part, ":"); print part[1] * 3600 + part[2] * 60 + part[3] }
')
SECONDS_TO_TRAIN=$((WALLTIME - SECONDS - 360)) # SECONDS: since this script has begun
export GPUS_PER_NODE NNODES MASTER_ADDR SECONDS_TO_TRAIN

# Single quotes: PALS_RANKID is each node's own.
# shellcheck disable=SC2016
mpiexec -n "$NNODES" --ppn 1 --cpu-bind none bash -c '
    exec timeout --signal=TERM "$SECONDS_TO_TRAIN" ezpz-moe train "$@" \
        --nproc "$GPUS_PER_NODE" --nnodes "$NNODES" \
        --node-rank "$PALS_RANKID" --master-addr "$MASTER_ADDR"
' bash "$JOB"
