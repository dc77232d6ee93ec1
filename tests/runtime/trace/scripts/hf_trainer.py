"""transformers' Trainer, mixed precision, accumulation, padded batches: python hf_trainer.py MODEL OUT."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

rows = [{"input_ids": [1 + i % 50] * 128, "attention_mask": [1] * 100 + [0] * 28} for i in range(64)]
for row in rows:
    row["labels"] = row["input_ids"][:100] + [-100] * 28
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
arguments = TrainingArguments(
    output_dir=sys.argv[2],
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    bf16=True,
    logging_steps=1,
    max_steps=20,
    report_to=[],
)
Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=default_data_collator).train()
