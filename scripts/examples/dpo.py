"""HFT in TRL's DPOTrainer: `python scripts/examples/dpo.py OUT`."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hft_cli import HalfFinetuneCallback, half_finetune, verify
from hft_cli.paths import resolve_path

base, out = resolve_path("pocket:model"), sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
pairs = load_dataset("json", data_files=resolve_path("pocket:preferences/capitals.jsonl"), split="train[:16]")

draw = half_finetune(model, ratio=0.5, seed=42)
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        out, num_train_epochs=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True
    ),
    train_dataset=pairs,
    processing_class=tokenizer,
    callbacks=[HalfFinetuneCallback(draw)],
)
trainer.train()
trainer.save_model(f"{out}/model")
print(verify(base, f"{out}/model", draw).verified)
