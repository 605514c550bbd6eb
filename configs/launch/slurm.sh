#!/bin/bash
# titan_fast on SLURM: one torchrun per host, which starts a process per GPU.
#
#   sbatch --nodes 8 configs/launch/slurm.sh --config configs/llama3_8b.toml
#
# What follows the script's name is titan_fast.train's. Change the #SBATCH lines for your cluster; `sbatch` options win.
#SBATCH --job-name=titan_fast
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1           # torchrun is the task; it makes the processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64            # of a whole host, for 8 processes and their data threads
#SBATCH --exclusive
#SBATCH --output=slurm-%j.out
#SBATCH --requeue                     # when SLURM loses a host, it starts the job again and the run goes on by itself
#SBATCH --open-mode=append            # and its log is continued
#SBATCH --signal=USR1@300             # 5 minutes before the time limit: time to save; see below

set -euo pipefail

# A port that is the same on all hosts, below those that Linux gives out by itself (from 32768 on); by the job's
# number, so that two jobs on a host do not meet.
PORT=$((20000 + SLURM_JOB_ID % 12000))
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
GPUS=${SLURM_GPUS_ON_NODE:-8}

# A thread per process unless told otherwise: 8 processes that each use all cores are slower.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# With more than one network, the one that the hosts reach each other by (NCCL finds InfiniBand by itself):
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# Before the time limit SLURM sends SIGUSR1 (--signal above) to all processes of the srun below, on every host. The run
# saves a checkpoint on it, all ranks together, and the job ends with status 1, torchrun's after any signal. Not
# SIGTERM, which SLURM takes for a cancelled step, and which srun, when a shell sends it on, turns into SIGKILL.

# --cpus-per-task: srun does not take sbatch's, since SLURM 22.05.
# --rdzv-backend c10d: hosts meet at the first one and agree on ranks; --rdzv-id keeps jobs apart.
# --max-restarts: a process that dies, or a host that is out of reach for a while, makes all processes start again from
#   the newest checkpoint, without SLURM. A host that is gone for good is SLURM's business: --requeue.
# --shutdown-timeout: how long torchrun lets its processes save after SIGTERM, 30 s otherwise. Not there in torch 2.11,
#   where it must be left out and the wait is always 30 s.
# --signals-to-handle: torchrun dies of SIGUSR1, and leaves its processes behind, unless it is named.
# --kill-on-bad-exit: when one host's torchrun has given up, the others are ended too instead of waiting for it.
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$GPUS" \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$HEAD:$PORT" \
    --max-restarts=3 \
    --shutdown-timeout=240 \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
    -m titan_fast.train "$@"
