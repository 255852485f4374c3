"""Give your own adapter gates, so that others find it by the tag phatgoose-gates and route to it.

    python examples/05_gates.py me/my-adapter train.parquet

Columns of the file: prompt and target for a language model, text and label for a classifier. One vector per linear
layer is trained, everything else stays as it is; then the file, the tag and a paragraph of the card go into the
adapter's repo:

    gates of 112 linear layers, loss 0.745 → 0.518
    pushed to me/my-adapter at 0123456789
"""

import sys

from hf_fusion import push_gates, train_gates
from hf_fusion.data import load_rows

adapter, data = sys.argv[1:]
gates = train_gates(adapter, load_rows(data), steps=100, batch_size=8)
before, after = gates.facts["loss_before"], gates.facts["loss_after"]
print(f"gates of {len(gates.vectors)} linear layers, loss {before:.3f} → {after:.3f}")

pushed = push_gates(gates, adapter)
print(f"pushed to {pushed.repo_id} at {pushed.sha[:10]}")
