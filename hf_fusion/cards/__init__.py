"""Model cards: facts about a fused model, and the templates that render them."""
