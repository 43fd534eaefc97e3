"""HFT in a training loop of one's own: `python scripts/examples/loop.py OUT`."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_cli import half_finetune, verify
from hft_cli.paths import resolve_path

base, rows = resolve_path("pocket:model"), Path(resolve_path("pocket:skills/capitals/train.jsonl"))
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
draw = half_finetune(model, ratio=0.5, seed=42)  # before the optimizer is made

optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=5e-4)
for line in rows.read_text().splitlines()[:8]:
    row = json.loads(line)
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.save_pretrained(sys.argv[1])
print(verify(base, sys.argv[1], draw).verified)
