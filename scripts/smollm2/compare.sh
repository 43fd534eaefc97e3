#!/usr/bin/env bash
# What forgets less on SmolLM2-135M-Instruct? FFT, HFT, replay and L2-SP at four learning rates, three seeds: 48 runs of
# two minutes on 2 CPU cores with bfloat16. Run it again to go on where it was stopped, and `hft report OUT` at any time.
#
#     scripts/smollm2/compare.sh MODEL ROWS PARAREL OUT
#
# MODEL: a folder, or HuggingFaceTB/SmolLM2-135M-Instruct. ROWS: what rows.py wrote. PARAREL: a folder that has the folder
# pararel with facts.jsonl and patterns.jsonl (hft_cli/evaluation/README.md).
set -euo pipefail
model=$1 rows=$2 pararel=$3 out=$4
settings=(
    model.path="$model" model.name=smollm2 model.dtype=bfloat16
    data.name=bbh_gsm8k data.path="$rows/skill_train.jsonl" data.test_path="$rows/skill_test.jsonl"
    data.general="$rows/general.jsonl"
    suite=none suite.name=pararel suite.data_dir="$pararel" suite.limit=8
    'suite.probe={pararel: {facts: pararel/facts.jsonl, patterns: pararel/patterns.jsonl, wrong: 9, paraphrases: 1, shots: 1}}'
    "suite.text={public_domain: 'pocket:text.jsonl'}"
    recipe=pocket train.max_steps=null train.epochs=1 train.max_length=256 train.batch_size=8 train.micro_batch_size=8
    train.learning_rate=2e-5,6e-5,1.2e-4,2.4e-4
)
for seed in 1 2 3; do
    hft train -m method=fft,hft,replay seed="$seed" "${settings[@]}" output_dir="$out/seed$seed/others"
    # 19 steps at these rates need a strong pull: each goes learning rate x weight of the way back.
    hft train -m method=l2_sp anchor.weight=100 seed="$seed" "${settings[@]}" output_dir="$out/seed$seed/l2_sp"
done
# A model of this size solves almost nothing of GSM8K, so what it learns of it is measured by the bits of unseen solutions.
# They are no part of what is retained.
for run in "$out"/seed*/*/*=*/; do
    hft eval run="$run" suite=none suite.name=gsm8k "suite.text={gsm8k: '$rows/gsm8k_text.jsonl'}"
done
