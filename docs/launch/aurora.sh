#!/bin/bash -l
#PBS -N ezpz_moe
#PBS -l select=2
#PBS -l place=scatter
#PBS -l filesystems=home:flare
#PBS -j oe
# qsub -A PROJECT -q QUEUE -l walltime=02:00:00 -v JOB=my/job.toml aurora.sh
#
# Aurora: 6 GPUs of 2 tiles on each node, a process for each tile.
set -euo pipefail
cd "$PBS_O_WORKDIR"

module load frameworks # or your own environment with torch 2.14 or newer for XPU

TILES_PER_NODE=12
export ZE_FLAT_DEVICE_HIERARCHY=FLAT # a tile is a device; LOCAL_RANK chooses it, no affinity mask
export CCL_PROCESS_LAUNCHER=torchrun # not pmix: the workers are torchrun's, not mpiexec's
export CCL_ATL_TRANSPORT=ofi         # not mpi, for the same reason
export FI_PROVIDER=cxi
export CCL_KVS_IFACE=hsn0 # node 0 is met on the fast network
unset CCL_KVS_MODE CCL_KVS_USE_MPI_RANKS

NNODES=$(sort -u "$PBS_NODEFILE" | wc -l)
MASTER_ADDR=$(head -n 1 "$PBS_NODEFILE" | cut -d . -f 1).hsn.cm.aurora.alcf.anl.gov

# PBS kills a job seconds after its limit. So the run gets SIGTERM 360 seconds before: it saves the
# step that it is at, which it has 300 seconds for, and ends. Submit the same line to go on.
WALLTIME=$(qstat -f "$PBS_JOBID" | awk '
    /Resource_List.walltime/ { split($3, part, ":"); print part[1] * 3600 + part[2] * 60 + part[3] }
')
SECONDS_TO_TRAIN=$((WALLTIME - SECONDS - 360)) # SECONDS: since this script has begun
export TILES_PER_NODE NNODES MASTER_ADDR SECONDS_TO_TRAIN

# Single quotes: PALS_RANKID is each node's own.
# shellcheck disable=SC2016
mpiexec -n "$NNODES" --ppn 1 --cpu-bind none bash -c '
    exec timeout --signal=TERM "$SECONDS_TO_TRAIN" ezpz-moe train "$@" \
        --nproc "$TILES_PER_NODE" --nnodes "$NNODES" \
        --node-rank "$PALS_RANKID" --master-addr "$MASTER_ADDR"
' bash "$JOB"
