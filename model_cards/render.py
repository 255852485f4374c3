"""Render the golden cards.

    python model_cards/render.py                                         # NAME.md from each NAME.json here
    python model_cards/render.py demo/foe-digits demo/foe-digits@SHA     # first update foe.json from a demo's model
    python model_cards/render.py demo/router demo/phatgoose-smollm2@SHA  # the same, with its figure
    python model_cards/render.py merged demo/smollm2-ties@SHA            # merge.json; HF_ENDPOINT: its experts' Hub

Run it after changing a template; a test compares the result.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

from hf_fusion.cards.card import render_card
from hf_fusion.cards.facts import facts_from_json, read_facts
from hf_fusion.families import FAMILIES
from hf_fusion.hub.licenses import combine
from hf_fusion.publishing.plan import plan
from hf_fusion.types import ExpertInfo

HERE = Path(__file__).parent


def take_facts(folder: Path, pinned: str) -> None:
    """Write a golden card's JSON from the folder of a published model."""
    repo_id, _, sha = pinned.partition("@")
    rows = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("experts")
    if rows is None:  # a static merge: metadata of its experts come from the Hub
        facts = plan(folder, repo_id).facts
    else:
        experts = [
            ExpertInfo(row["name"], row["revision"], row["task"], license=row["license"], labels=tuple(row["labels"]))
            for row in rows
        ]
        facts = read_facts(folder, repo_id, experts, combine({info.id: info.license for info in experts}))
    content = json.dumps(asdict(replace(facts, revision=sha)), indent=2, ensure_ascii=False)
    (HERE / f"{facts.family}.json").write_text(f"{content}\n", encoding="utf-8")
    if facts.routing and (routing := FAMILIES[facts.family].map):  # and its figure
        shutil.copy(folder / routing.picture, HERE)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        take_facts(Path(sys.argv[1]), sys.argv[2])
    for path in HERE.glob("*.json"):
        path.with_suffix(".md").write_text(render_card(facts_from_json(path)), encoding="utf-8")
