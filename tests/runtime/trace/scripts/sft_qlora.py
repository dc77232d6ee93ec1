"""QLoRA by TRL's SFTTrainer, with a paged 8-bit optimizer: python sft_qlora.py MODEL OUT."""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=quantization, device_map={"": 0}, dtype=torch.bfloat16
)
rows = Dataset.from_list([{"text": "one two three four " * (8 + 8 * (i % 3))} for i in range(32)])
arguments = SFTConfig(
    output_dir=sys.argv[2],
    per_device_train_batch_size=2,
    max_length=128,
    bf16=True,
    optim="paged_adamw_8bit",
    max_steps=20,
    logging_steps=1,
    report_to=[],
)
lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora).train()
