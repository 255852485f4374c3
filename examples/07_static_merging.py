"""From adapters on the Hub to one plain model, merged once: measured beside them, and published.

    python examples/07_static_merging.py HuggingFaceTB/SmolLM2-135M-Instruct demo demo/questions demo/my-ties

That is their base, an author whose fine-tunes and adapters of it are looked for, a folder with test.parquet, and where
to publish. Columns of the rows: prompt and target (or text and label), task, and expert, whose task it is. On the Hub
and with the rows that `hf-fusion demo phatgoose` leaves behind (`hf-fusion hub serve demo/hub`, then HF_ENDPOINT and
HF_TOKEN) it takes four minutes and prints, with other commits:

    merged    demo/number-sorting
    merged    demo/word-reversal
    merged    demo/word-sorting
    merged    demo/chain-sum
    merged    demo/number-range
    merged               16.5 (13 to 22)
    best single          22.0 (19 to 27)
    base                 0.0 (0 to 4)
    published demo/my-ties at 81421e5626

Tasks so unlike lose much in one set of weights: 04_route.py routes among such experts instead.
"""

import sys

from hf_fusion import check_compatibility, discover, evaluate, fuse, publish
from hf_fusion.data import load_rows, split_tasks

base, author, data, repo = sys.argv[1:]
experts = check_compatibility(discover(author=author, base_model=base), base_model=base).accepted  # each at its commit
for expert in experts:
    print(f"merged    {expert.id}")
model = fuse("ties", experts, base, density=0.5)  # `hf-fusion fuse` writes the same to a folder, whatever its size

suite, owners = split_tasks(load_rows(data, "test"), [expert.id for expert in experts])
results = evaluate(model, suite, experts=experts, base=base, owners=owners)
single = results.best("expert")
for name, scores in {"merged": results["merged"], "best single": single, "base": results["base"]}.items():
    print(f"{name:20} {scores.means['held-in']}")

published = publish(model, repo, results=results)  # private; loads with transformers, runs no code of its repo
print(f"published {published.repo_id} at {published.sha[:10]}")
