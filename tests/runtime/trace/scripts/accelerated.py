"""A loop under accelerate, with its scaler for fp16: python accelerated.py MODEL PRECISION."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

accelerator = Accelerator(mixed_precision=sys.argv[2], gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loader = DataLoader([torch.full((128,), 1 + i % 50) for i in range(64)], batch_size=2, pin_memory=True)
scheduler = get_linear_schedule_with_warmup(optimizer, 2, 100)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
model.train()
for ids in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
