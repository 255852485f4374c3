"""From fine-tunes on the Hub to one published model whose weights are merged per input.

    python examples/06_merge.py demo/vit-digits demo demo/pictures demo/my-merge

That is their base, an author whose fine-tunes of it are looked for, a folder with train.parquet (no labels needed) and
test.parquet, and where to publish. Columns of the rows: image or text, task, and expert, whose task it is. On the Hub
and with the rows that `hf-fusion demo wemoe` leaves behind (`hf-fusion hub serve demo/hub`, then HF_ENDPOINT and
HF_TOKEN) it takes half a minute and prints, cut short on the right:

    rejected  demo/vit-digits-smaller   shapes: vit.embeddings.cls_token is [1, 1, 64], in the base [1, 1, 80]
    WEMoE                86.1 (84 to 88)
    base                 65.2 (63 to 67)
    simple average       70.4 (68 to 72)
    task arithmetic      69.0 (67 to 71)
    individual experts   87.9 (86 to 89)
    published demo/my-merge at 027b6b3146
"""

import sys

from hf_fusion import adapt_routers, check_compatibility, discover, evaluate, fuse, publish
from hf_fusion.data import load_rows, split_tasks

base, author, data, repo = sys.argv[1:]
found = discover(author=author, base_model=base)
verdict = check_compatibility(found, base_model=base, merging=True)  # reads configs and headers, no weights
for entry in verdict.rejected:
    print(f"rejected  {entry.info.id:25} {entry.reasons[0]}")

model = fuse("wemoe", verdict.accepted, base=base)  # each at the commit that was looked at
suite, owners = split_tasks(load_rows(data, "train"), model.experts)
adapt_routers(model, {owners[task]: rows for task, rows in suite.items()}, steps=100, learning_rate=1e-3)

suite, owners = split_tasks(load_rows(data, "test"), model.experts)
results = evaluate(model, suite, experts=verdict.accepted, base=base, owners=owners)
for predictor in results.predictors:
    print(f"{predictor.name:20} {predictor.means['held-in']}")

published = publish(model, repo, results=results)  # private; its card pins the commit
print(f"published {published.repo_id} at {published.sha[:10]}")
