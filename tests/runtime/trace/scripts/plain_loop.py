"""Full fine-tuning in a loop of one's own, in bf16: python plain_loop.py MODEL."""

import sys

import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to("cuda")
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(100):
    ids = torch.randint(0, model.config.vocab_size, (2, 128))
    batch = {"input_ids": ids.to("cuda"), "labels": ids.clone().to("cuda")}
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
