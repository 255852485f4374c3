"""Render the golden cards: ``python model_cards/render.py`` writes NAME.md from each NAME.json here.

Run it after changing a template; a test compares.
"""

from pathlib import Path

from hf_fusion.hub.card import facts_from_json, render_card

for facts in Path(__file__).parent.glob("*.json"):
    facts.with_suffix(".md").write_text(render_card(facts_from_json(facts)), encoding="utf-8")
