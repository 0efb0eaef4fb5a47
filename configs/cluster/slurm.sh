#!/bin/bash
# One experiment as a Slurm job: sbatch configs/cluster/slurm.sh CONFIG FOLDER [--data DIR] [--set KEY=VALUE]...
#
# On the GPUs of the nodes:
#   --set options.device=cuda --set resources.lower.cpu=6 --set resources.lower.gpu=0.8 --set resources.upper.gpu=0.2
#
# All nodes mount the file system of FOLDER. They also mount this package's virtual environment and the home folder with
# Ray's token. The environment has Python 3.11 or newer and the versions of constraints.txt, and its bin/ is in PATH.
#
# Tune saves every ten seconds. If a job ran out of time, submit the same line again to continue from there. Nodes are
# for this job alone, since `ray symmetric-run` at its end ends whatever Ray runs there. Set --cpus-per-task and
# --gpus-per-task to what a node has.
#SBATCH --job-name=raybilevel
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --time=12:00:00
set -euo pipefail

config=$1
folder=$2
shift 2
if [ ! -f "$HOME/.ray/auth_token" ]; then
    (umask 077 && ray get-auth-token --generate > /dev/null)  # Ray (2.60) leaves it to be read by everybody
fi
export RAY_AUTH_MODE=token
# A node that does not answer counts as lost after less than ten seconds.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=1500 RAY_health_check_failure_threshold=3
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # Python's first start from a shared folder may take minutes

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
if [ -d "$folder/tune" ]; then
    config=$folder/config.yaml
    resume=(--resume)
fi
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" -- \
    raybilevel run "$config" --address auto --out "$folder" --set search.max_failures=3 "$@" "${resume[@]}"
