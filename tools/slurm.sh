#!/usr/bin/env bash
# Slurm job that trains on several nodes and requeues itself until the run is complete:
#
#   sbatch --nodes 4 tools/slurm.sh --cfg configs/dat_tiny.yaml --data-path /imagenet
#
# Submit it from the folder of main.py; what follows the name of the script are arguments of main.py. Two minutes before
# the time limit, and on preemption, Slurm signals the job. The processes save and end with exit code 75, the job is
# requeued, and the run resumes. Any other exit code ends the job: the run is done, or something needs repair.
#
# Adapt: partition and account, GPUs and cores per node, and how your Python environment is activated.
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

# Ignore the signals here: this shell waits for the exit code of the processes.
trap : TERM HUP USR1 USR2 XCPU

# One process per GPU. srun returns the highest exit code of all processes, where torchrun would return 1. After the
# first process has ended, the others have a minute.
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
