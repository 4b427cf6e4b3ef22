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
# Slurm sends SIGTERM 5 minutes before the time limit, or at a preemption if the cluster sends the
# job's own signal then (docs/cluster.md); training then finishes its update, saves it and exits
# with code 75. srun does not inherit --cpus-per-task from sbatch.
code=0
export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
  python scripts/train.py --config configs/3b.py --mesh.data rest --mesh.fsdp 8 \
  --data.paths "${DATA:?set DATA to the text, on a file system that all nodes see}" \
  --run_dir "${RUN_DIR:-runs/3b}" || code=$?

# A requeued job resumes from its last checkpoint. SLURM_RESTART_COUNT counts every requeue.
restarts=${SLURM_RESTART_COUNT:-0}
case "$code" in
  75) again=yes ;; # stopped and saved
  # Failed, stalled, or a process was lost, which may be the fault of a node: not for ever.
  1 | 110 | 134 | 137 | 139) [ "$restarts" -lt "${MAX_RESTARTS:-20}" ] && again=yes || again=no ;;
  *) again=no ;; # done, or a mistake in the input, divergence, a full disk or memory
esac
if [ "$again" = yes ]; then
  echo "exit code $code after $restarts restarts: the job is requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
