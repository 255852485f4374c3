"""From a tag on the Hub to one published model that routes every token among the adapters that bear it.

    python examples/04_route.py HuggingFaceTB/SmolLM2-135M-Instruct demo demo/my-router

That is a base, an author whose adapters are looked for, and where to publish. On the Hub that
`hf-fusion demo phatgoose` leaves behind (`hf-fusion hub serve demo/hub`, then HF_ENDPOINT and HF_TOKEN)
it prints, with other commits:

    routed    demo/chain-sum
    routed    demo/number-range
    routed    demo/number-sorting
    routed    demo/word-reversal
    routed    demo/word-sorting
    published demo/my-router at 0123456789
"""

import sys

from hf_fusion import check_compatibility, discover, fuse, publish

base, author, repo = sys.argv[1:]
found = discover(tags="phatgoose-gates", author=author, base_model=base)
verdict = check_compatibility(found, base_model=base, need_gates=True)  # reads configs and headers, no weights
for entry in verdict.rejected:
    print(f"rejected  {entry.info.id:25} {entry.reasons[0]}")

router = fuse("phatgoose", verdict.accepted, top_k=2, base_by_reference=True)  # each at the commit that was looked at
for name in router.experts:
    print(f"routed    {name}")

published = publish(router, repo)  # private; its card pins the commit
print(f"published {published.repo_id} at {published.sha[:10]}")
