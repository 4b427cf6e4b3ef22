#!/usr/bin/env bash
# Trains configs/3b.py on 4 nodes of 8 GPUs: sbatch scripts/slurm_3b.sh   (see docs/cluster.md)
#SBATCH --job-name=inl-3b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# One process per node uses its 8 GPUs: parameters are sharded within a node, rows over all GPUs.
# Slurm sends SIGTERM 5 minutes before the time limit; training then finishes its update, saves it
# and exits with code 75. srun does not inherit --cpus-per-task from sbatch.
code=0
export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  python scripts/train.py --config configs/3b.py --mesh.data rest --mesh.fsdp 8 \
  --data.paths "${DATA:?set DATA to the text, on a file system that all nodes see}" \
  --run_dir "${RUN_DIR:-runs/3b}" || code=$?

# 75: stopped and saved. The requeued job resumes from there.
if [ "$code" = 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
