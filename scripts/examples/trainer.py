"""HFT in transformers' Trainer, over two rounds: `python scripts/examples/trainer.py OUT`."""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hft_cli import HalfFinetuneCallback, half_finetune, next_round, verify
from hft_cli.paths import resolve_path

base, out = resolve_path("pocket:model"), sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def rows(skill):
    data = load_dataset("json", data_files=resolve_path(f"pocket:skills/{skill}/train.jsonl"), split="train[:16]")
    return data.map(lambda row: tokenizer.apply_chat_template(row["messages"], return_dict=True))


draw = half_finetune(model, ratio=0.5, seed=42)
trainer = Trainer(
    model,
    TrainingArguments(out, num_train_epochs=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True),
    train_dataset=rows("backwards"),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[HalfFinetuneCallback(draw)],
)
trainer.train()

next_round(model, trainer)  # the other task trains another half
trainer.train_dataset = rows("order")
trainer.train()

trainer.save_model(f"{out}/model")
print(verify(base, f"{out}/model", f"{out}/draws.json").verified)
