"""HFT in a loop with Accelerate: `accelerate launch scripts/examples/accelerate_loop.py OUT`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_cli import half_finetune, verify
from hft_cli.paths import resolve_path

base, rows = resolve_path("pocket:model"), Path(resolve_path("pocket:skills/capitals/train.jsonl"))
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
texts = [f"{row['prompt']} {row['answer']}" for row in map(json.loads, rows.read_text().splitlines()[:16])]
ids = [tokenizer(text)["input_ids"] for text in texts]

draw = half_finetune(model, ratio=0.5, seed=42)  # before prepare()
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=5e-4)
loader = torch.utils.data.DataLoader(ids, batch_size=1, collate_fn=torch.tensor)
wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    accelerator.backward(wrapped(input_ids=batch, labels=batch).loss)
    optimizer.step()
    optimizer.zero_grad()

accelerator.wait_for_everyone()
if accelerator.is_main_process:
    accelerator.unwrap_model(wrapped).save_pretrained(sys.argv[1])
    print(verify(base, sys.argv[1], draw).verified)
