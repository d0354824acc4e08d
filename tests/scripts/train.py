"A plain fine-tuning script: runs of one base on a CSV file, left as a Trainer leaves them."

import sys

import pandas as pd
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

base, data, out = sys.argv[1:4]
rows = pd.read_csv(data)
tokenizer = AutoTokenizer.from_pretrained(base)
names = sorted(rows["Sentiment"].unique())
encoded = tokenizer(rows["Review Text"].tolist(), truncation=True, max_length=40)
labels = rows["Sentiment"].map(names.index).tolist()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(labels)

    def __getitem__(self, i):
        return {k: v[i] for k, v in encoded.items()} | {"labels": labels[i]}


for run in (1, 2, 3, 4):
    set_seed(run)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names))
    arguments = TrainingArguments(
        f"{out}/run-{run}",
        max_steps=6,
        save_steps=3,
        learning_rate=2e-3,
        seed=run,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Rows(),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    if run > 2:  # the others are known by their checkpoint-N alone
        trainer.save_model()
