#!/bin/bash
# Several machines under Slurm: sbatch configs/cluster/slurm.sh configs/MINE.yaml [section.key=value ...]
#
# Assumes: eight cards a machine; project, .venv, data, models, cache.cache_dir and logging.output_dir at the same paths
# on a file system that all machines share and that has locks (flock); sbatch is called in the project's folder.
#SBATCH --job-name=qif
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
set -euo pipefail

export OMP_NUM_THREADS=4
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150  # seconds that torchrun leaves the trainers to save once it is told to end
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # not into `head`: whoever writes on when it has gone is killed
first=${hosts%%$'\n'*}
cards=${SLURM_GPUS_ON_NODE:-8}
# One torchrun a machine; it starts one process a card. A process that dies ends all of them, and they start again from
# the newest checkpoint. Three minutes before the time is over torchrun is told to end, and the trainers save.
srun .venv/bin/torchrun \
  --nnodes "$SLURM_NNODES" --nproc_per_node "$cards" --max_restarts 3 \
  --rdzv_backend c10d --rdzv_endpoint "$first:29500" --rdzv_id "$SLURM_JOB_ID" \
  -m qwen_image_finetune.cli train "$@" train.resume_from_checkpoint=latest
