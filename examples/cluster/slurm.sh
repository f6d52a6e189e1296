#!/usr/bin/env bash
# A stage on several nodes of a SLURM cluster. docs/nodes.md
#
#   sbatch --nodes=2 examples/cluster/slurm.sh scripts/train/gpt5-8b-SeqKD-gspo.sh --model MODEL --exp_name NAME
#
# Submit from the checkout, on storage that all nodes see. --nnodes and --head or --worker are added here. Set the
# partition, account, GPUs and time of your cluster below or behind sbatch. From the environment: PYTHON, DATA_DIR,
# N_GPUS_PER_NODE (as many as SLURM gives a node), LAUNCH_FLAGS.
#SBATCH --job-name=verl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Ten minutes before the time is over, for the step at hand and a checkpoint.
#SBATCH --signal=TERM@600
#SBATCH --output=verl-%j.log
#SBATCH --open-mode=append
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch --nodes=N $0 scripts/train/STAGE.sh FLAGS..." >&2
    exit 2
fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Two jobs may share a node; below the ports where ranks meet.
port=$((10000 + SLURM_JOB_ID % 10000))
# One token for all nodes, in the environment of this job's processes, which only their owner can read.
RAY_AUTH_TOKEN=$("${PYTHON:-python3}" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export N_GPUS_PER_NODE=${N_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

echo "head: $head:$port; nodes: $SLURM_JOB_NODELIST"
# Expanded on the node, where the task's number is known.
# shellcheck disable=SC2016
task='
    script=$1 worker=$2 port=$3; shift 3
    if ((SLURM_PROCID == 0)); then
        exec bash "$script" --head --port "$port" --nnodes "$SLURM_JOB_NUM_NODES" "$@"
    fi
    exec bash "$script" --worker "$worker:$port"'
script=$1
shift
# A node that ends first must not take the head from a run that still has to save.
exec srun --ntasks-per-node=1 --kill-on-bad-exit=0 --label bash -c "$task" task "$script" "$head" "$port" "$@"
