#!/usr/bin/env bash
# Trains on several nodes under Slurm until the run is complete, however often it is preempted or its time is up:
#
#   sbatch --nodes 4 tools/slurm.sh --cfg configs/dat_tiny.yaml --data-path /imagenet
#
# to be called where main.py is; what follows the script's name are arguments of main.py. Two minutes before its time is
# up, and when it is preempted, the job's processes are asked to stop. They save, end with exit code 75, and the job is
# put back into the queue, where it goes on from there. Any other end is an end: done, or something to be repaired.
#
# Adapt below: partition and account, GPUs and cores of a node, and how your Python is activated.
#SBATCH --job-name=dat
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -u
# module load cuda; source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# This shell outlives what the processes are told, to see how they end.
trap : TERM USR1

# One process per GPU. srun returns the highest exit code of all; torchrun would hide it behind its own 1. When one
# process has ended, the others have a minute to do the same.
# shellcheck disable=SC2016  # the variables are those of each process
srun --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python main.py "$@"' main.py "$@"
code=$?

if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
