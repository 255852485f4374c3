"""Two experts that each know half of the classes, and rows of all."""

from __future__ import annotations

import datasets
import torch
from tiny import make_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from hf_fusion import Expert

LABELS = ["zero", "one", "two", "three"]


class Halves:
    """Two experts that each really know two of four classes, because they were trained on them."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        words = ["fox dog", "gate router", "nine stitch", "model experts"]
        torch.manual_seed(0)
        noise = torch.randint(3, 250, (600,)).tolist()
        rows = [(f"{words[i % 4]} {self.tokenizer.decode([noise[i]])}", i % 4) for i in range(600)]
        self.data = datasets.Dataset.from_dict({"text": [r[0] for r in rows], "label": [LABELS[r[1]] for r in rows]})
        self.experts = [
            self._expert(f"me/{'-'.join(LABELS[c] for c in known)}", rows, known) for known in [(0, 1), (2, 3)]
        ]

    def _expert(self, name: str, rows: list, known: tuple[int, int]) -> Expert:
        torch.manual_seed(known[0])
        labels = [LABELS[c] for c in known]
        config = BertConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        model = BertForSequenceClassification(config)
        mine = [row for row in rows[:200] if row[1] in known]
        inputs = self.tokenizer([row[0] for row in mine], padding=True, return_tensors="pt")
        targets = torch.tensor([known.index(row[1]) for row in mine])
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(12):  # more would make them just as sure of classes they never saw
            optimizer.zero_grad()
            model(**inputs, labels=targets).loss.backward()
            optimizer.step()
        return Expert(name, model.eval(), processor=self.tokenizer, labels=labels)
