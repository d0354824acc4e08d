"A plain PEFT script: one LoRA adapter of a base on a CSV file."

import sys

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

base, data, out = sys.argv[1:4]
rows = pd.read_csv(data)
tokenizer = AutoTokenizer.from_pretrained(base)
set_seed(1)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
names = sorted(rows["Sentiment"].unique())
for start in range(0, 24, 8):
    part = rows.iloc[start : start + 8]
    batch = tokenizer(part["Review Text"].tolist(), padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor(part["Sentiment"].map(names.index).tolist())
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)
tokenizer.save_pretrained(out)
