#!/bin/bash
# Prints a command for each of the paper's experiments. To run some of them, pipe into bash:
#   scripts/experiments.sh pocket                     a laptop: the embedded model, three seeds, minutes each
#   scripts/experiments.sh node                       one node with 8 GPUs: Llama 2, the runs of a sweep one by one
#   scripts/experiments.sh slurm --partition=gpu      SLURM: each run of a sweep is a job on one node
#   scripts/experiments.sh slurm | grep ratio | bash
# Variables: MODELS (llama2_7b llama2_13b), TRACE (/data/TRACE, the folder of its files), OUT (runs).
# What follows `slurm` is a setting of every job: --partition=NAME, --account=NAME, --qos=NAME, --timeout_min=N,
# --cpus_per_task=N, --mem_gb=N. When the runs are done: hft report FOLDER…
set -eu
where=${1:-}
case $where in
pocket | node | slurm) shift ;;
*)
    echo "scripts/experiments.sh pocket|node|slurm [--SETTING=VALUE …]" >&2
    exit 2
    ;;
esac
out=$(printf %q "${OUT:-runs}") trace=$(printf %q "${TRACE:-/data/TRACE}") more= # quoted for the shell
if [ "$where" = slurm ]; then
    more=" hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=8 hydra.launcher.timeout_min=1440"
    for setting in "$@"; do
        more+=" hydra.launcher.$(printf %q "${setting#--}")"
    done
fi

# Print the command of an experiment: line NAME FOLDER [OTHER ARGUMENTS].
line() {
    echo "hft train -m experiment=$1 ${3:+$3 }output_dir=$out/$2$more"
}

if [ "$where" = pocket ]; then
    echo "hft train +method=fft output_dir=$out/tuned" # for the pilot
    line half_reset_pilot pilot "size=pocket model.tuned=$out/tuned/model model.base=pocket:model \
data.test_path=pocket:skills/capitals/test.jsonl"
    for name in sft_general_knowledge dpo trace ratio_ablation level_ablation embedding_head_ablation; do
        line $name $name size=pocket
    done
    exit
fi
for model in ${MODELS:-llama2_7b llama2_13b}; do
    line sft_general_knowledge "sft-$model" model="$model"
    line dpo "dpo-$model" model="$model"
    line trace "trace-$model" "model=$model data.path=$trace"
done
line half_reset_pilot pilot "model.tuned=meta-llama/Llama-2-7b-chat-hf model.base=meta-llama/Llama-2-7b-hf"
for name in ratio_ablation level_ablation embedding_head_ablation; do
    line $name $name "data.path=$trace"
done
