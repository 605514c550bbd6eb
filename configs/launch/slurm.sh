#!/bin/bash
# titan_fast on SLURM: one torchrun per host, which starts a process per GPU.
#
#   sbatch --nodes 8 configs/launch/slurm.sh --config configs/llama3_8b.toml
#
# For a run longer than the time limit, give that several times with `--dependency=singleton`: each job waits for the
# one before, and goes on where it has stopped. One that finds the run finished ends at once.
#
# What follows the script's name goes to titan_fast.train. Change the #SBATCH lines for your cluster; options of
# `sbatch` override them.
#SBATCH --job-name=titan_fast
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1           # torchrun, which starts the processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64            # a whole host's, for 8 processes and their data threads
#SBATCH --exclusive
#SBATCH --output=slurm-%j.out
#SBATCH --requeue                     # if SLURM loses a host, it starts the job again, and the run resumes
#SBATCH --open-mode=append            # and continues its log
#SBATCH --signal=USR1@300             # 5 minutes before the time limit, to save; see below

set -euo pipefail

# A port that is the same on all hosts, below those that Linux assigns by itself (from 32768 on), and different for two
# jobs on a host.
PORT=$((20000 + SLURM_JOB_ID % 12000))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
GPUS=${SLURM_GPUS_ON_NODE:-8}

# One thread per process by default: 8 processes that each use all cores are slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# If there are several networks, the one between hosts (NCCL finds InfiniBand by itself):
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# Before the time limit SLURM sends SIGUSR1 (--signal above) to all processes of the srun below, on every host. All
# ranks then save a checkpoint together, and the job ends with status 1, torchrun's after any signal. Not SIGTERM, which
# SLURM takes for a cancelled step, and which srun, if a shell forwards it, turns into SIGKILL. `scancel` and `scontrol
# requeue` send SIGTERM, and SIGKILL after KillWait, by default 30 s: the run saves if it can within that time.

# --cpus-per-task: since SLURM 22.05 srun does not inherit sbatch's.
# --rdzv-backend c10d: hosts meet at the first one and agree on ranks; --rdzv-id keeps jobs apart.
# --rdzv-conf: hosts that are cut off from the first for less than this many seconds come back; the default is 60.
# --max-restarts: if a process dies, or a host cannot be reached for a while, all processes restart from the newest
#   checkpoint, without SLURM. If a host is lost for good, SLURM restarts the job (--requeue).
# --shutdown-timeout: how long torchrun lets its processes save after SIGTERM; the default is 30 s. torch 2.11 does not
#   have this option: leave it out there, and the wait is always 30 s.
# --signals-to-handle: SIGUSR1 must be named, or torchrun dies of it and leaves its processes behind.
# --kill-on-bad-exit: if one host's torchrun gives up, the others are ended too instead of waiting for it.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$GPUS" \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$HEAD:$PORT" \
    --rdzv-conf=read_timeout=600 \
    --max-restarts=3 \
    --shutdown-timeout=240 \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
    -m titan_fast.train "$@"
