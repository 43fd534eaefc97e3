"""HFT in Lightning: `python scripts/examples/lightning_loop.py OUT`. Needs the package lightning."""

import json
import sys
from pathlib import Path

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hft_cli import half_finetune, verify
from hft_cli.paths import resolve_path

base, rows = resolve_path("pocket:model"), Path(resolve_path("pocket:skills/capitals/train.jsonl"))
tokenizer = AutoTokenizer.from_pretrained(base)
texts = [f"{row['prompt']} {row['answer']}" for row in map(json.loads, rows.read_text().splitlines()[:8])]
ids = [tokenizer(text)["input_ids"] for text in texts]


class Finetuning(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(base)
        self.draw = half_finetune(self.model, ratio=0.5, seed=42)  # before configure_optimizers()

    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([value for value in self.parameters() if value.requires_grad], lr=5e-4)


module = Finetuning()
trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=1, collate_fn=torch.tensor))
module.model.save_pretrained(sys.argv[1])
print(verify(base, sys.argv[1], module.draw).verified)
