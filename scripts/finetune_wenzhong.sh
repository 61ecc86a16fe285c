#!/usr/bin/env bash
# Finetune Wenzhong-GPT2-3.5B on question-answer pairs with DeepSpeed ZeRO-3.
#
#   bash finetune_wenzhong.sh                    one process on one GPU (12 GB; the host holds the weights: 100 GB)
#   GPUS=8 bash finetune_wenzhong.sh             torchrun on this machine
#   NODES=2 GPUS=8 HEAD=node0 bash ...           torchrun on several machines: the same line on each of them
#   sbatch finetune_wenzhong.sh                  Slurm: nodes and GPUs are those of the #SBATCH lines
#   DRY_RUN=1 bash finetune_wenzhong.sh          print the command and stop
#
# Words after the script's name go to `fengshen fit` and win over the recipe: --trainer.max_epochs 3 --model.optimizer.lr 3e-5
# Stopped by a signal (Ctrl-C, SIGTERM, Slurm's time limit), it saves and ends with exit code 75: the same line again goes on. Under Slurm the job is requeued.
# Learning rate, batch, epochs and the rest stand in the recipe: `fengshen recipes cat wenzhong_qa_offload`.

# ---- Slurm: these lines are read by sbatch alone; change them to your cluster, or delete them ----
#SBATCH --job-name=finetune_wenzhong
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
# ---------------------------------------------------------------------------------------------------

set -euo pipefail

TRAIN="${TRAIN:-train.jsonl}"                        # a line for each pair: {"question": "...", "answer": "..."}
VALID="${VALID:-}"                                   # the same, to validate on; empty: no validation
MODEL="${MODEL:-IDEA-CCNL/Wenzhong-GPT2-3.5B}"       # a hub id, or the folder that holds the model
RECIPE="${RECIPE:-wenzhong_qa_offload}"              # or wenzhong_qa_24gb, wenzhong_qa: larger GPUs, faster; or your own YAML
RUN_DIR="${RUN_DIR:-runs/finetune_wenzhong}"         # checkpoints, record and export; on several machines a folder that all of them see
NODES="${NODES:-${SLURM_JOB_NUM_NODES:-1}}"          # machines
GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-1}}"             # processes on each machine, one a GPU
HEAD="${HEAD:-localhost}"                            # the machine where the processes meet; under Slurm the first of the job
PORT="${PORT:-$((20000 + ${SLURM_JOB_ID:-9500} % 20000))}"  # a port that is free there; under Slurm another for each job

fit=(fit -c "$RECIPE" --model.path "$MODEL" --data.train "$TRAIN" --run_dir "$RUN_DIR")
if [ -n "$VALID" ]; then fit+=(--data.valid "$VALID"); fi
# Lightning takes its place among the processes from torchrun, and checks it against these two
fit+=(--trainer.devices "$GPUS" --trainer.num_nodes "$NODES" "$@")

for name in NODES GPUS PORT; do
    if ! [[ "${!name}" =~ ^[1-9][0-9]*$ ]]; then echo "$0: $name is '${!name}', expected a number from 1" >&2; exit 2; fi
done
if [ "$PORT" -gt 65535 ]; then echo "$0: PORT is $PORT, expected 1 to 65535" >&2; exit 2; fi
if [ "$NODES" -gt 1 ] && [ -z "${SLURM_JOB_ID:-}" ] && [ "$HEAD" = localhost ]; then
    echo "$0: NODES is $NODES and HEAD is localhost; expected the name of the first machine, the same on all of them" >&2; exit 2
fi

if [ -n "${SLURM_JOB_ID:-}" ]; then
    HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    HEAD="${HEAD%%$'\n'*}"
    command=(srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1)
else
    command=()
fi
if [ -n "${SLURM_JOB_ID:-}" ] || [ "$NODES" -gt 1 ]; then
    command+=(torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id "${SLURM_JOB_ID:-wenzhong}")
    command+=(-m fengshen.cli.main "${fit[@]}")
elif [ "$GPUS" -gt 1 ]; then
    command+=(torchrun --standalone --nproc_per_node "$GPUS" -m fengshen.cli.main "${fit[@]}")
else
    command+=(fengshen "${fit[@]}")
fi

if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    status=0
    "${command[@]}" || status=$?
    if [ "$status" -ne 0 ] && [ -f "$RUN_DIR/stopped" ]; then status=75; fi  # torchrun reports every end of its processes as 1
    if [ "$status" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$status"
fi
